// The list of conversations: the newest first; a deleted one can be taken back until the page is left.
import { $, add, addButton, plain } from "/dom.js";

const WIDE = matchMedia("(min-width: 60rem)");

export function showSidebar(shown) {
  document.body.classList.toggle("with-sidebar", shown);
  $("sidebar-button").setAttribute("aria-expanded", String(shown));
  $("sidebar").inert = !shown;
  $("backdrop").hidden = !shown || WIDE.matches;
}

export const closeSidebarIfNarrow = () => { if (!WIDE.matches) showSidebar(false); };

export function setUpSidebar() {
  showSidebar(WIDE.matches);
  WIDE.addEventListener("change", () => showSidebar(WIDE.matches));
  $("sidebar-button").addEventListener("click", () => showSidebar($("sidebar").inert));
  $("backdrop").addEventListener("click", () => showSidebar(false));
}

const deleted = new Map(); // conversations of this visit that can be taken back

// `acts`: {open, remove, restore}; `isWriting` says which are being answered.
export function drawSidebar(conversations, current, isWriting, acts) {
  const list = $("conversations");
  list.replaceChildren();
  const all = [...conversations, ...deleted.values()].sort((one, other) => other.updatedAt - one.updatedAt);
  for (const conversation of all) {
    const item = add(list, "li");
    if (deleted.has(conversation.id)) drawDeleted(item, conversation, acts);
    else drawItem(item, conversation, conversation === current, isWriting(conversation), acts);
  }
}

function drawItem(item, conversation, isCurrent, isWriting, acts) {
  const title = conversation.title || "Without words";
  const open = addButton(item, "open", plain(title), () => acts.open(conversation));
  open.title = `${plain(title)}\n${new Date(conversation.updatedAt).toLocaleString()}`;
  if (isCurrent) open.setAttribute("aria-current", "true");
  if (isWriting) item.classList.add("writing");
  const remove = addButton(item, "quiet icon remove", "×", () => {
    deleted.set(conversation.id, conversation);
    acts.remove(conversation);
  });
  remove.setAttribute("aria-label", `Delete: ${plain(title)}`);
}

function drawDeleted(item, conversation, acts) {
  item.classList.add("deleted");
  add(item, "span", "", "Deleted");
  addButton(item, "quiet", "Take back", () => {
    deleted.delete(conversation.id);
    acts.restore(conversation);
  });
}
