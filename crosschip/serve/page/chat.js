// The chat page: talks to this server's OpenAI-compatible API and to nothing else.
import { Answering } from "/answering.js";
import { Problem, listModels } from "/api.js";
import { addTurn, newConversation, showBranchOf, shownTurns, versionsOf } from "/conversation.js";
import { $, plain } from "/dom.js";
import { showChoice, showModel, whyNoChat } from "/model.js";
import { askForKey, instructions, samplingParameters, setUpSettings, settingsAreValid } from "/settings.js";
import { closeSidebarIfNarrow, drawSidebar, setUpSidebar } from "/sidebar.js";
import { ConversationStore } from "/store.js";
import { AnswerView, QuestionView, describe } from "/turns.js";

const LOOK_AGAIN_MS = 30_000;
const DRAFT = "crosschip.draft";
const scroller = $("scroller");
const question = $("question");
const welcome = $("welcome");
const ASKING = { heading: welcome.querySelector("h1").textContent, text: $("welcome-text").textContent };

let models = [];
let model = null;
let current = newConversation();
let follows = true; // whether the page stays at the end of what is being written
const conversations = new Map();
const underWay = new Map(); // conversation -> Answering
let views = new Map(); // turn -> its view, of the shown conversation
const store = new ConversationStore((text) => showNotice("store", text), changedElsewhere);

// --- The shown conversation

// What is shown already stays as it is: an unfolded reasoning, a question that is being edited, a selected text.
function draw() {
  const turns = shownTurns(current);
  const before = views;
  views = new Map(turns.map((turn, index) => [turn, viewOf(turn, turns[index + 1], before.get(turn))]));
  const boxes = turns.length ? turns.map((turn) => views.get(turn).box) : [welcome];
  const shown = [...$("conversation").children];
  if (boxes.length !== shown.length || boxes.some((box, index) => box !== shown[index])) {
    $("conversation").replaceChildren(...boxes);
  }
  $("save-file").hidden = turns.length === 0;
  if (follows) toEnd();
  drawList();
  showState();
}

function viewOf(turn, next, before) {
  const versions = versionsOf(current, turn);
  const isUnanswered = next?.content === "" && next.state !== "writing";
  const key = `${versions.indexOf(turn)} of ${versions.length} ${isUnanswered}`;
  if (before?.key === key) return before;
  const isAnswer = turn.role === "assistant";
  const view = isAnswer ? new AnswerView(turn, versions, ACTS) : new QuestionView(turn, versions, isUnanswered, ACTS);
  return Object.assign(view, { key });
}

const ACTS = {
  edit: (turn, text) => ask(text, turn.parent),
  retry: (turn) => answer(current.turns[turn.parent]),
  show: (turn) => {
    showBranchOf(current, turn);
    save(current);
    draw();
  },
  drawn: () => { if (follows) toEnd(); },
};

function toEnd() {
  scroller.scrollTop = scroller.scrollHeight;
}

function drawList() {
  const kept = [...conversations.values()];
  drawSidebar(kept, current, (conversation) => underWay.has(conversation), { open, remove, restore });
}

function showState() {
  const writes = underWay.has(current);
  $("send").hidden = writes;
  $("stop").hidden = !writes;
  $("send").disabled = model === null || question.disabled || question.value.trim() === "";
}

// What is wrong with the store and with the server, side by side.
const notices = { store: "", server: "" };

function showNotice(about, text) {
  notices[about] = text;
  const told = Object.values(notices).filter(Boolean).join("\n");
  $("notice").hidden = !told;
  $("notice").textContent = plain(told);
}

// --- Asking and answering

function ask(text, parent) {
  if (!mayAsk()) return false;
  conversations.set(current.id, current);
  const turn = addTurn(current, parent, "user", text);
  answer(turn);
  return true;
}

const mayAsk = () => model !== null && !underWay.has(current) && settingsAreValid();

async function answer(asked) {
  if (!mayAsk()) return;
  const conversation = current;
  const wanted = { model: model.id, instructions: instructions(), settings: samplingParameters() };
  const answering = new Answering(conversation, asked, wanted, { save, changed });
  underWay.set(conversation, answering);
  follows = true;
  save(conversation);
  draw();
  const problem = await answering.run();
  underWay.delete(conversation);
  announce(problem ? answering.turn.problem : `The answer has ended. ${describe(answering.turn)}`);
  if (conversation === current) draw();
  else drawList();
  if (isNews(answering.turn.answeredBy ?? {})) lookForModels();
  if (problem instanceof Problem && problem.wantsKey) askForKey();
}

// Whether an answer came from other weights than the head of the page says, or under another certificate.
function isNews(answeredBy) {
  const shown = model.crosschip;
  return ["weights_version", "certificate"].some((name) => answeredBy[name] && shown[name] && answeredBy[name] !== shown[name]);
}

function changed(turn) {
  views.get(turn)?.changed();
}

async function save(conversation) {
  const { id } = conversation;
  if (conversations.get(id) !== conversation) return; // deleted meanwhile
  await store.save(conversation);
  if (conversation.id === id) return;
  // Another tab has changed the one of this name: both are kept.
  conversations.delete(id);
  conversations.set(conversation.id, conversation);
  if (conversation === current) remember();
  changedElsewhere(id);
}

function announce(text) {
  $("announcement").textContent = text;
}

const stop = () => underWay.get(current)?.stop();

// --- Which conversation

function open(conversation) {
  current = conversation;
  follows = true;
  remember();
  draw();
  closeSidebarIfNarrow();
}

function newChat() {
  open(newConversation());
  question.focus();
}

// The address names the conversation, so that going back, and loading the page again, show it.
function remember() {
  const hash = current.leaf ? `#${current.id}` : "";
  if (location.hash !== hash) history.pushState(null, "", location.pathname + hash);
}

function openFromAddress() {
  current = conversations.get(location.hash.slice(1)) ?? newConversation();
  follows = true;
  draw();
}

function remove(conversation) {
  underWay.get(conversation)?.stop();
  conversations.delete(conversation.id);
  store.remove(conversation.id);
  if (conversation === current) newChat();
  else drawList();
}

function restore(conversation) {
  conversations.set(conversation.id, conversation);
  store.save(conversation);
  drawList();
}

// As another tab has left it. What is being answered here stays as it is here.
async function changedElsewhere(id) {
  const mine = conversations.get(id);
  if (mine && underWay.has(mine)) return;
  if (mine === current && document.querySelector(".editor")) return; // what is kept here comes beside what is there
  const theirs = await store.get(id);
  if (theirs) conversations.set(id, adopted(theirs));
  else conversations.delete(id);
  if (mine && mine === current) {
    current = theirs ?? newConversation();
    draw();
  } else drawList();
}

function adopted(conversation) {
  for (const turn of Object.values(conversation.turns)) if (turn.state === "writing") turn.state = "cut";
  return conversation;
}

function saveFile() {
  const name = { user: "You", assistant: "Model" };
  const parts = shownTurns(current).map((turn) => `## ${name[turn.role]}\n\n${turn.content}\n`);
  const file = new Blob([`# ${current.title}\n\n${parts.join("\n")}`], { type: "text/markdown" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = `${current.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "conversation"}.md`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// --- What answers

async function lookForModels() {
  try {
    models = await listModels();
    showNotice("server", "");
    chooseModel(models.find((card) => card.id === model?.id) ?? models[0]);
  } catch (problem) {
    showNotice("server", problem.message);
    if (problem.wantsKey && !model) askForKey();
  }
  showState();
}

function chooseModel(card) {
  model = card;
  showModel(card);
  showChoice(models, card);
  const lacking = whyNoChat(card);
  question.disabled = lacking !== "";
  question.placeholder = lacking ? `no ${lacking}` : "Write a message";
  showWelcome(card, lacking);
  showState();
}

function showWelcome(card, lacking) {
  const instead = card.crosschip.has_tokenizer ? "continues text." : "takes and gives token ids.";
  welcome.querySelector("h1").textContent = lacking ? "This model cannot chat" : ASKING.heading;
  $("welcome-text").textContent = lacking
    ? `Its directory has no ${lacking}. The API at /v1/completions ${instead}`
    : ASKING.text;
}

// --- Keys and buttons

function fitQuestion() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
  sessionStorage.setItem(DRAFT, question.value);
  showState();
}

const isTouch = matchMedia("(pointer: coarse)");

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || !ask(text, current.leaf)) return;
  remember();
  question.value = "";
  fitQuestion();
});
question.addEventListener("input", fitQuestion);
question.addEventListener("keydown", (event) => {
  // While an input method composes a character, Enter belongs to it; on a phone it makes a line.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !isTouch.matches) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
  if (event.key === "ArrowUp" && question.value === "" && !underWay.has(current)) {
    const asked = shownTurns(current).filter((turn) => turn.role === "user").pop();
    if (asked) { event.preventDefault(); views.get(asked).edit(); }
  }
});
document.addEventListener("keydown", (event) => {
  const writing = event.target.closest?.("textarea, input, select");
  if (event.key === "Escape") stop();
  if (event.key === "/" && !writing) { event.preventDefault(); question.focus(); }
  if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) { event.preventDefault(); newChat(); }
});
scroller.addEventListener("scroll", () => {
  follows = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
  $("to-end").hidden = follows;
});
$("to-end").addEventListener("click", toEnd);
$("stop").addEventListener("click", stop);
$("new-chat").addEventListener("click", newChat);
$("save-file").addEventListener("click", saveFile);
$("model-choice").addEventListener("change", () => {
  chooseModel(models.find((card) => card.id === $("model-choice").value));
});
addEventListener("popstate", openFromAddress);
setInterval(() => { if (!document.hidden) lookForModels(); }, LOOK_AGAIN_MS);

async function begin() {
  setUpSettings(lookForModels);
  setUpSidebar();
  question.value = sessionStorage.getItem(DRAFT) ?? "";
  fitQuestion();
  try {
    for (const kept of await store.all()) conversations.set(kept.id, adopted(kept));
  } catch (error) {
    showNotice("store", `The conversations that were kept cannot be read: ${error.message}`);
  }
  // Someone may have asked already.
  if (current.leaf === null) openFromAddress();
  else drawList();
  await lookForModels();
}

begin();
