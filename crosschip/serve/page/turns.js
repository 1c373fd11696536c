// A turn of the conversation on the page: the question, or the answer with its reasoning, figures and origin.
import { add, addButton, addCopyButton, count, element, figure, plain } from "/dom.js";
import { MarkdownView } from "/markdown.js";

export const isWriting = (turn) => turn.state === "writing";

function addVersions(parent, versions, turn, show) {
  if (versions.length < 2) return;
  const index = versions.indexOf(turn);
  const group = add(parent, "span", "versions");
  const step = (text, label, to) => {
    const button = addButton(group, "quiet", text, () => show(versions[to]));
    button.setAttribute("aria-label", label);
    button.disabled = to < 0 || to >= versions.length;
  };
  step("‹", "The version before", index - 1);
  add(group, "span", "", `${index + 1} / ${versions.length}`);
  step("›", "The next version", index + 1);
}

// `acts` are what the page does with a turn: {edit, retry, show}.
export class QuestionView {
  constructor(turn, versions, isUnanswered, acts) {
    this.box = element("article", "turn user");
    this.box.setAttribute("aria-label", "You");
    this.turn = turn;
    this.acts = acts;
    this.text = add(this.box, "div", "question-text", plain(turn.content));
    this.text.dir = "auto";
    if (isUnanswered) add(this.box, "p", "left-out", "Without an answer; the model is not told of it.");
    this.actions = add(this.box, "div", "actions");
    addVersions(this.actions, versions, turn, acts.show);
    addCopyButton(this.actions, () => turn.content);
    addButton(this.actions, "quiet edit", "Edit", () => this.edit());
  }

  edit() {
    const form = element("form", "editor");
    const field = add(form, "textarea");
    field.value = this.turn.content;
    field.setAttribute("aria-label", "The question, to be changed");
    field.rows = Math.min(this.turn.content.split("\n").length + 1, 12);
    const end = () => { form.remove(); this.text.hidden = this.actions.hidden = false; };
    const row = add(form, "div", "actions");
    addButton(row, "quiet", "Leave as it is", end);
    const send = add(row, "button", "solid", "Ask this instead");
    send.type = "submit";
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); end(); }
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const text = field.value.trim();
      if (text) this.acts.edit(this.turn, text);
    });
    this.text.hidden = this.actions.hidden = true;
    this.box.append(form);
    field.focus();
  }
}

const ENDINGS = {
  length: "the longest answer was reached",
  content_filter: "the server's filter ended it",
  tool_calls: "it wants to call a tool, which this page has not",
};

// One answer. Text arrives often; the page is written at most once a frame, and less often where that takes long.
export class AnswerView {
  constructor(turn, versions, acts) {
    this.box = element("article", "turn assistant");
    this.box.setAttribute("aria-label", "The model");
    this.turn = turn;
    this.acts = acts;
    this.versions = versions;
    this.body = add(this.box, "div", "answer");
    this.markdown = new MarkdownView(this.body);
    this.foot = add(this.box, "div", "foot");
    this.nextDraw = 0;
    this.timer = 0;
    this.draw();
  }

  changed() {
    if (this.timer) return;
    this.timer = setTimeout(() => requestAnimationFrame(() => this.draw()), Math.max(0, this.nextDraw - performance.now()));
  }

  draw() {
    const began = performance.now();
    clearTimeout(this.timer);
    this.timer = 0;
    const writing = isWriting(this.turn);
    this.box.classList.toggle("working", writing);
    this.box.setAttribute("aria-busy", String(writing));
    if (this.turn.reasoning) this.drawReasoning();
    if (writing) this.markdown.write(this.turn.content);
    else this.markdown.finish(this.turn.content);
    this.drawFoot();
    this.acts.drawn?.();
    const now = performance.now();
    this.nextDraw = now + 4 * (now - began); // a fifth of the time at most
  }

  drawReasoning() {
    const { turn } = this;
    if (!this.summary) {
      const details = element("details", "reasoning");
      this.summary = add(details, "summary");
      this.thought = add(details, "div", "thought");
      this.thought.dir = "auto";
      this.box.prepend(details);
    }
    const tokens = turn.usage?.completion_tokens_details?.reasoning_tokens;
    const length = tokens ? count(tokens, "token") : count(turn.reasoning.length, "character");
    const goesOn = isWriting(turn) && !turn.content;
    this.summary.textContent = `${goesOn ? "Reasoning …" : "Reasoning"} · ${length}`;
    // Appended, not written anew: a reader may be selecting in it.
    const shown = plain(turn.reasoning);
    const before = this.thought.textContent;
    if (shown.startsWith(before)) this.thought.append(shown.slice(before.length));
    else this.thought.textContent = shown;
    this.thought.normalize();
  }

  drawFoot() {
    const line = describe(this.turn);
    if (isWriting(this.turn)) {
      this.foot.replaceChildren(element("p", "figures", line));
      return;
    }
    this.foot.replaceChildren();
    if (line) {
      const about = add(this.foot, "details", "about");
      add(about, "summary", "figures", line).title = "What answered, and how";
      about.append(origin(this.turn));
    }
    if (this.turn.problem) this.drawProblem();
    const row = add(this.foot, "div", "actions");
    addVersions(row, this.versions, this.turn, this.acts.show);
    if (this.turn.content) addCopyButton(row, () => this.turn.content);
    if (!this.turn.problem) addButton(row, "quiet retry", "Try again", () => this.acts.retry(this.turn));
  }

  drawProblem() {
    const box = add(this.foot, "div", "problem");
    box.setAttribute("role", "alert");
    const kept = this.turn.content || this.turn.reasoning ? " What came is kept." : "";
    const wait = this.turn.retryAfterS ? ` It asks to wait ${count(this.turn.retryAfterS, "second")}.` : "";
    add(box, "p", "", plain(this.turn.problem + wait + kept));
    addButton(box, "solid retry", "Try again", () => this.acts.retry(this.turn));
  }
}

// One line: who, how much, how fast, and how it ended.
export function describe(turn) {
  const parts = [];
  const { usage } = turn;
  if (isWriting(turn) && !usage && !turn.content) return turn.waitedS >= 2 ? `waiting for the server · ${turn.waitedS} s` : "";
  if (!isWriting(turn) && turn.answeredBy?.model) parts.push(plain(turn.answeredBy.model));
  if (!isWriting(turn) && turn.answeredBy && turn.answeredBy.certificate !== "CERTIFIED") parts.push("UNCERTIFIED");
  if (usage?.completion_tokens) parts.push(count(usage.completion_tokens, "token"));
  const rate = tokensPerSecond(turn);
  if (rate) parts.push(`${figure(rate)} tokens/s`);
  if (turn.state === "stopped") parts.push("stopped");
  if (turn.state === "cut") parts.push("not written to its end");
  if (turn.state === "done" && !turn.content) parts.push("no answer came");
  if (turn.stalledS) parts.push(`nothing new for ${turn.stalledS} s`);
  if (ENDINGS[turn.finish]) parts.push(ENDINGS[turn.finish]);
  return parts.join(" · ");
}

// By the server's clock where it tells (however the network bundles the parts), else by this page's.
function tokensPerSecond(turn) {
  const tokens = (turn.usage?.completion_tokens ?? 0) - 1;
  const seconds = turn.usage?.decode_s ?? turn.decodeS;
  const rate = tokens / seconds;
  return tokens > 0 && Number.isFinite(rate) ? rate : 0;
}

function origin(turn) {
  const list = element("dl", "origin");
  const by = turn.answeredBy ?? {};
  const { usage } = turn;
  const reasoning = usage?.completion_tokens_details?.reasoning_tokens;
  const certificate = by.certificate === "CERTIFIED" ? "CERTIFIED" : `UNCERTIFIED${by.certificate_problem ? `: ${by.certificate_problem}` : ""}`;
  const rows = [
    ["Model", by.model],
    ["Chip", by.chip],
    ["Engine", by.engine],
    ["Weights version", by.weights_version],
    ["Certificate", by.model && certificate],
    ["Directory", by.model_dir],
    ["Question", usage?.prompt_tokens !== undefined && count(usage.prompt_tokens, "token")],
    ["Answer", usage && count(usage.completion_tokens, "token") + (reasoning ? `, ${reasoning} of them reasoning` : "")],
    ["First token after", turn.firstTokenS !== undefined && `${turn.firstTokenS.toFixed(2)} s`],
    ["Settings", turn.settings && (Object.entries(turn.settings).map(([name, value]) => `${name} ${JSON.stringify(value)}`).join(", ") || "the model's own")],
    ["Written", new Date(turn.at).toLocaleString()],
  ];
  for (const [name, value] of rows) {
    if (value === undefined || value === null || value === false || value === "") continue;
    add(list, "dt", "", name);
    add(list, "dd", "", plain(String(value)));
  }
  return list;
}
