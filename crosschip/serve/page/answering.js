// An answer being written: asked for, taken in as it comes, kept every second, and ended in words whatever happens.
import { Problem, streamAnswer } from "/api.js";
import { addTurn, messagesFor } from "/conversation.js";

const SAVE_EVERY_MS = 1000;
const STALLED_AFTER_S = 10;

export class Answering {
  // `acts`: {save(conversation), changed(turn)}
  constructor(conversation, question, { model, instructions, settings }, acts) {
    this.conversation = conversation;
    this.question = question;
    this.acts = acts;
    this.controller = new AbortController();
    this.body = { model, messages: messagesFor(conversation, question.id, instructions), ...settings };
    this.turn = addTurn(conversation, question.id, "assistant", "");
    Object.assign(this.turn, { reasoning: "", state: "writing", settings, answeredBy: null });
    if (instructions) this.turn.settings = { instructions, ...settings };
  }

  stop() {
    this.controller.abort();
  }

  // Never throws: a problem is a part of the turn. Returns it.
  async run() {
    this.beganAt = this.latestAt = performance.now();
    const ticking = setInterval(() => this.tick(), 1000);
    let problem = null;
    try {
      for await (const chunk of streamAnswer(this.body, this.controller.signal)) this.take(chunk);
    } catch (error) {
      if (!this.controller.signal.aborted) problem = error;
    }
    clearInterval(ticking);
    this.end(problem);
    await this.acts.save(this.conversation);
    return problem;
  }

  take(chunk) {
    const { turn } = this;
    const choice = chunk.choices?.[0];
    const delta = choice?.delta ?? {};
    const reasoning = delta.reasoning_content ?? delta.reasoning ?? "";
    const content = delta.content ?? "";
    if (chunk.choices) this.latestAt = performance.now();
    if (reasoning || content) {
      this.firstAt ??= this.latestAt;
      turn.firstTokenS = (this.firstAt - this.beganAt) / 1000;
      turn.decodeS = (this.latestAt - this.firstAt) / 1000;
    }
    turn.reasoning += reasoning;
    turn.content += content;
    if (chunk.usage) turn.usage = chunk.usage;
    if (choice?.finish_reason) turn.finish = choice.finish_reason;
    // A gateway's name for an engine and its chip, told first, come before the engine's own. Of the certificate what is
    // told last holds: an answer that waited for new weights learns only when it is begun which they are.
    const { engine, chip } = turn.answeredBy ?? {};
    const first = Object.entries({ engine, chip }).filter(([, value]) => value);
    const model = chunk.model ?? turn.answeredBy?.model;
    turn.answeredBy = { ...turn.answeredBy, ...chunk.crosschip, ...Object.fromEntries(first), model };
    this.acts.changed(turn);
    if (this.latestAt - (this.savedAt ?? this.beganAt) > SAVE_EVERY_MS) {
      this.savedAt = this.latestAt;
      this.acts.save(this.conversation);
    }
  }

  tick() {
    const seconds = Math.floor((performance.now() - this.latestAt) / 1000);
    if (!this.firstAt) this.turn.waitedS = seconds;
    else this.turn.stalledS = seconds >= STALLED_AFTER_S ? seconds : 0;
    this.acts.changed(this.turn);
  }

  end(problem) {
    const { turn } = this;
    delete turn.waitedS;
    delete turn.stalledS;
    turn.state = problem ? "failed" : this.controller.signal.aborted ? "stopped" : "done";
    if (problem) {
      turn.problem = problem instanceof Problem ? problem.message : `This page has a defect: ${problem.message}`;
      turn.retryAfterS = problem.retryAfterS || 0;
    }
    this.conversation.updatedAt = Date.now();
    this.acts.changed(turn);
  }
}
