// A conversation as a tree: an edited question and a second answer stand beside the first, and nothing is lost.
//
// {id, title, createdAt, updatedAt, revision, leaf, turns: {id: {id, parent, role, content, at, ...}}}
// `leaf` is the last turn of the branch that is shown.

export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");

export function newConversation() {
  const now = Date.now();
  return { id: newId(), title: "", createdAt: now, updatedAt: now, revision: 0, leaf: null, turns: {} };
}

export function addTurn(conversation, parent, role, content) {
  const turn = { id: newId(), parent, role, content, at: Date.now() };
  conversation.turns[turn.id] = turn;
  conversation.leaf = turn.id;
  conversation.updatedAt = turn.at;
  if (role === "user" && !conversation.title) conversation.title = titleOf(content);
  return turn;
}

const titleOf = (text) => Array.from(text.trim().replace(/\s+/g, " ")).slice(0, 80).join("");

// The shown branch, from the first question on.
export function shownTurns(conversation, leaf = conversation.leaf) {
  const turns = [];
  const seen = new Set(); // a stored file could hold a circle
  for (let id = leaf; id && conversation.turns[id] && !seen.has(id); id = conversation.turns[id].parent) {
    seen.add(id);
    turns.push(conversation.turns[id]);
  }
  return turns.reverse();
}

// The versions of a turn, the oldest first.
export function versionsOf(conversation, turn) {
  const versions = Object.values(conversation.turns).filter((other) => other.parent === turn.parent);
  return versions.sort((one, other) => one.at - other.at);
}

// Show the branch of a turn, down to the newest turn in it.
export function showBranchOf(conversation, turn) {
  let leaf = turn;
  for (;;) {
    const next = Object.values(conversation.turns).filter((other) => other.parent === leaf.id);
    if (!next.length) break;
    leaf = next.reduce((newest, other) => (other.at >= newest.at ? other : newest));
  }
  conversation.leaf = leaf.id;
}

// What the model is told: a question without an answer is left out, so that the turns stay in order; so is reasoning.
export function messagesFor(conversation, leaf, instructions) {
  const turns = shownTurns(conversation, leaf);
  const messages = instructions ? [{ role: "system", content: instructions }] : [];
  turns.forEach((turn, index) => {
    const isLast = index === turns.length - 1;
    const answered = turns[index + 1]?.role === "assistant" && turns[index + 1].content !== "";
    if (turn.role === "user" && (isLast || answered)) messages.push({ role: "user", content: turn.content });
    if (turn.role === "assistant" && turn.content !== "") messages.push({ role: "assistant", content: turn.content });
  });
  return messages;
}
