// The chat page: talks to this server's OpenAI-compatible API and to nothing else.
import { render } from "/render.js";

const $ = (id) => document.getElementById(id);
const conversation = $("conversation");
const scroller = $("scroller");
const question = $("question");
const welcome = $("welcome");

let model = null;
let messages = []; // what the model has been told and has answered, without its reasoning
let underWay = null; // the AbortController of the answer that is being written

function add(parent, name, className, text) {
  const made = document.createElement(name);
  made.className = className;
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

const count = (number, unit) => `${number.toLocaleString("en")} ${unit}${number === 1 ? "" : "s"}`;

function showCertificate(status) {
  const banner = $("certificate");
  banner.hidden = status.certificate !== "UNCERTIFIED";
  banner.replaceChildren();
  add(banner, "strong", "", "UNCERTIFIED");
  banner.append(": nothing shows that this model answers here as it did on the chip that trained it");
}

function showModel(card) {
  const about = card.crosschip;
  document.title = `${card.id} · crosschip`;
  $("model-name").textContent = card.id;
  $("model-facts").textContent =
    `${(about.num_parameters / 1e6).toFixed(1)} M parameters · ${about.dtype} · ${about.chip}`;
  $("model-facts").title = about.model_dir;
  $("temperature").placeholder = about.default_sampling.temperature;
  $("max-tokens").placeholder = `up to ${card.max_model_len}`;
  showCertificate(about);
  if (!about.has_chat_template) {
    const lacking = about.has_tokenizer ? "chat template" : "tokenizer";
    welcome.querySelector("h1").textContent = "This model cannot chat";
    $("welcome-text").textContent =
      `Its directory has no ${lacking}. The API at /v1/completions ` +
      (about.has_tokenizer ? "continues text." : "takes and gives token ids.");
    question.disabled = true;
    question.placeholder = `no ${lacking}`;
  }
  model = card;
  showState();
}

function showState() {
  $("send").hidden = underWay !== null;
  $("stop").hidden = underWay === null;
  $("send").disabled = model === null || question.disabled || question.value.trim() === "";
}

function fitQuestion() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
  showState();
}

// One answer on the page. Text arrives often; the page is written at most once a frame.
class Answer {
  constructor() {
    this.turn = add(conversation, "article", "turn assistant working");
    this.reasoning = "";
    this.content = "";
    this.usage = null;
    this.frame = 0;
    this.body = add(this.turn, "div", "answer");
    this.figures = add(this.turn, "p", "figures");
  }

  take(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    const delta = chunk.choices[0]?.delta ?? {};
    this.reasoning += delta.reasoning_content ?? "";
    this.content += delta.content ?? "";
    this.frame ||= requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.frame = 0;
    const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
    if (this.reasoning) this.drawReasoning();
    this.body.replaceChildren(render(this.content));
    this.figures.textContent = this.describe();
    if (atEnd) scroller.scrollTop = scroller.scrollHeight;
  }

  drawReasoning() {
    if (!this.details) {
      this.details = document.createElement("details");
      this.details.className = "reasoning";
      this.summary = add(this.details, "summary", "");
      this.thought = add(this.details, "div", "thought");
      this.turn.prepend(this.details);
    }
    const length = count(this.usage?.completion_tokens_details.reasoning_tokens ?? 0, "token");
    this.summary.textContent = `${this.content || !underWay ? "Reasoning" : "Reasoning …"} · ${length}`;
    this.thought.textContent = this.reasoning;
  }

  describe() {
    if (!this.usage) return "";
    const parts = [count(this.usage.completion_tokens, "token")];
    const rate = (this.usage.completion_tokens - 1) / this.usage.decode_s; // by the server's clock
    if (Number.isFinite(rate)) parts.push(`${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`);
    if (this.ending) parts.push(this.ending);
    return parts.join(" · ");
  }

  end(ending) {
    this.ending = ending;
    cancelAnimationFrame(this.frame);
    this.turn.classList.remove("working");
    this.draw();
  }

  fail(message) {
    add(this.turn, "p", "problem", message);
    scroller.scrollTop = scroller.scrollHeight;
  }
}

async function* eventsOf(response) {
  const decoder = new TextDecoder();
  let text = "";
  for await (const bytes of streamOf(response.body)) {
    text += decoder.decode(bytes, { stream: true });
    const lines = text.split("\n");
    text = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

// Not every browser can iterate a stream yet.
async function* streamOf(body) {
  const reader = body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
}

function requestBody() {
  const system = $("system").value.trim();
  const body = {
    model: model.id,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  if ($("temperature").value !== "") body.temperature = Number($("temperature").value);
  if ($("max-tokens").value !== "") body.max_tokens = Number($("max-tokens").value);
  return JSON.stringify(body);
}

const ENDINGS = { length: "the longest answer was reached", stop: "" };

async function ask(text) {
  welcome.remove();
  messages.push({ role: "user", content: text });
  add(conversation, "article", "turn user", text);
  const answer = new Answer();
  scroller.scrollTop = scroller.scrollHeight;
  const mine = new AbortController();
  underWay = mine;
  showState();
  let ending = "";
  let problem = null;
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: requestBody(),
      signal: mine.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const chunk of eventsOf(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      ending = ENDINGS[chunk.choices[0]?.finish_reason] ?? ending;
      answer.take(chunk);
    }
  } catch (error) {
    if (mine.signal.aborted) ending = "stopped";
    else problem = error instanceof TypeError ? "The server does not answer. Is it still running?" : error.message;
  }
  if (underWay === mine) underWay = null;
  answer.end(ending);
  if (problem) answer.fail(problem);
  if (conversation.contains(answer.turn)) remember(answer, problem);
  showState();
}

// A question without an answer is taken back, so that the turns stay in order.
function remember(answer, problem) {
  if (problem && !answer.content) messages.pop();
  else messages.push({ role: "assistant", content: answer.content });
}

function stop() {
  underWay?.abort();
}

function newChat() {
  stop();
  underWay = null;
  messages = [];
  conversation.replaceChildren(welcome);
  question.focus();
  showState();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || underWay || !model) return;
  question.value = "";
  fitQuestion();
  ask(text);
});
question.addEventListener("input", fitQuestion);
question.addEventListener("keydown", (event) => {
  // While an input method composes a character, Enter belongs to it.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
$("stop").addEventListener("click", stop);
$("new-chat").addEventListener("click", newChat);
$("settings-button").addEventListener("click", () => {
  const hidden = $("settings").toggleAttribute("hidden");
  $("settings-button").setAttribute("aria-expanded", String(!hidden));
});

fetch("/v1/models")
  .then((response) => response.json())
  .then((list) => showModel(list.data[0]))
  .catch(() => {
    $("welcome-text").textContent = "The server does not answer. Is it still running?";
  });
showState();
