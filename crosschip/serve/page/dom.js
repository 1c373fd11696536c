// Elements of the page. Text becomes text nodes only: nothing here, or in any file beside, reads a string as HTML.

export const $ = (id) => document.getElementById(id);

export function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

export function add(parent, name, className, text) {
  const made = element(name, className, text);
  parent.append(made);
  return made;
}

export function addButton(parent, className, text, whenPressed) {
  const made = add(parent, "button", className, text);
  made.type = "button";
  made.addEventListener("click", whenPressed);
  return made;
}

export const count = (number, unit) => `${number.toLocaleString("en")} ${unit}${number === 1 ? "" : "s"}`;

export const figure = (number) => number.toFixed(number < 10 ? 1 : 0);

// Characters that turn the direction of what follows can make a text read as what it is not. In running text only the
// two that override the letters' own direction are shown as marks: the others are needed to write Arabic or Hebrew,
// and end with their paragraph. In code all are shown ("Trojan source", CVE-2021-42574).
const OVERRIDES = /[\u202D\u202E]/g;
const TURNS = /[\u061C\u200E\u200F\u202A-\u202E\u2066-\u2069]/g;
const asMark = (character) => `⟨U+${character.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;

export const plain = (text) => text.replace(OVERRIDES, asMark);
export const plainCode = (text) => text.replace(TURNS, asMark);

// The clipboard interface exists on https and on this machine only; elsewhere the old way, over a selected text.
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const box = add(document.body, "textarea", "unseen");
  box.value = text;
  box.select();
  const copied = document.execCommand("copy");
  box.remove();
  if (!copied) throw new Error("the browser does not let this page copy");
}

export function addCopyButton(parent, textOf) {
  const button = addButton(parent, "quiet copy", "Copy", async () => {
    try {
      await copy(textOf());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not copied";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  return button;
}
