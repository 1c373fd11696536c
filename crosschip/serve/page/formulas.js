// TeX in an answer: where it stands (as rules for the Markdown library), and as MathML (by Temml, loaded beside).
import { element, plainCode } from "/dom.js";

export const LONGEST_FORMULA = 5000; // characters; longer ones are shown as they were written
const SETTINGS = { strict: false, trust: false, throwOnError: true, maxSize: [30, 300], maxExpand: 1000 };
// A few characters of macro can grow to gigabytes. Answers do not need macros of their own.
const DEFINES = /\\(?:def|gdef|edef|xdef|let|futurelet|global|long|newcommand|renewcommand|providecommand)(?![a-zA-Z])/;

// A dollar opens a formula only before something that is not blank, and closes one only after such, and not before a
// digit: "from $5 to $10" is no formula (Pandoc's rule).
const DOLLARS = /^\$(?![\s$])((?:\\[^\n]|[^\\$\n]){1,1000}?)(?<!\s)\$(?!\d)/;
const PARENTHESES = /^\\\(([\s\S]{1,2000}?)\\\)/;
const DISPLAY = /^(?:\$\$([\s\S]{1,5000}?)\$\$|\\\[([\s\S]{1,5000}?)\\\])/;
const ENVIRONMENT = /^(\\begin\{((?:align|equation|gather|multline|cases|matrix|[pbv]matrix)\*?)\}[\s\S]{1,5000}?\\end\{\2\})/;
export const OPENS_FORMULA = /^ {0,3}(?:\$\$|\\\[|\\begin\{)/m;
const INLINE_START = /\$|\\[([]/;

function token(match, display) {
  const tex = match.slice(1).find((part) => part !== undefined);
  return { type: "formula", raw: match[0], tex, display };
}

// Rules in the form that `marked` takes. Blocks come first: inside a formula a line that starts with "-" is no list.
export const FORMULA_RULES = [
  {
    name: "formulaBlock",
    level: "block",
    start: (text) => OPENS_FORMULA.exec(text)?.index,
    tokenizer(text) {
      const indent = /^ {0,3}/.exec(text)[0];
      const rest = text.slice(indent.length);
      const match = DISPLAY.exec(rest) ?? ENVIRONMENT.exec(rest);
      const after = match && /^[ \t]*(?:\n|$)/.exec(rest.slice(match[0].length));
      if (!after || !match[0].trim()) return undefined;
      const found = token(match, true);
      return { ...found, type: "formulaBlock", raw: indent + found.raw + after[0] };
    },
  },
  {
    name: "formula",
    level: "inline",
    start: (text) => INLINE_START.exec(text)?.index,
    tokenizer(text) {
      const display = DISPLAY.exec(text);
      if (display) return token(display, true);
      const match = PARENTHESES.exec(text) ?? DOLLARS.exec(text);
      return match ? token(match, false) : undefined;
    },
  },
];

// MathML, or, where the TeX cannot be read (or is not whole yet), the TeX itself.
export function formula(tex, display) {
  // MathML breaks no lines. A formula that may be wider than a phone is scrolled; others stand on the text's line.
  const kind = display ? "display" : tex.length > 50 ? "long" : "inline";
  const box = element("span", `formula ${kind}`);
  try {
    if (tex.length > LONGEST_FORMULA || DEFINES.test(tex)) throw new RangeError("not rendered");
    globalThis.temml.render(tex, box, { ...SETTINGS, displayMode: display, macros: {} });
    // \label and the like could give an element the name of one of the page's own.
    for (const inner of box.querySelectorAll("[id], [href]")) {
      inner.removeAttribute("id");
      inner.removeAttribute("href");
    }
  } catch {
    box.replaceChildren(element("code", "tex", plainCode(tex.trim())));
  }
  box.title = tex.trim();
  return box;
}
