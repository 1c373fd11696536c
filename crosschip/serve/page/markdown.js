// The Markdown that models write, as elements. `marked` reads it; the elements are made here, from its tokens, so that
// no string is ever read as HTML: a tag in an answer is text, an image is a link, and a link goes to the web or nowhere.
import { Lexer, Marked } from "/vendor/marked-18.2.1.js";
import { add, addCopyButton, element, plain, plainCode } from "/dom.js";
import { FORMULA_RULES, LONGEST_FORMULA, OPENS_FORMULA, formula } from "/formulas.js";

const none = () => undefined;
const reader = new Marked();
reader.use({ gfm: true, tokenizer: { html: none, tag: none }, extensions: FORMULA_RULES });

// What is beyond these is shown as it was written: some of the library's patterns take time that grows with the square
// of a paragraph's length, and every level of nesting takes a call.
const LONGEST_PARAGRAPH = 10_000;
const NESTED = /^(?:[ \t]*(?:[-*+>]|\d{1,9}[.)])[ \t]*){16}/m;

const LONGEST_OPEN = 2 * LONGEST_FORMULA; // characters after which a formula that was opened will not be closed any more

const BLANK_LINE_AT_END = /\n[ \t]*\n$/;

const NAMED = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };
const ENTITY = /&(?:#(\d{1,7})|#[xX]([0-9a-fA-F]{1,6})|(amp|lt|gt|quot|apos|nbsp));/g;

function withoutEntities(text) {
  return text.replace(ENTITY, (whole, decimal, hexadecimal, name) => {
    if (name) return NAMED[name];
    const code = decimal ? parseInt(decimal, 10) : parseInt(hexadecimal, 16);
    return code > 0 && code <= 0x10ffff ? String.fromCodePoint(code) : whole;
  });
}

const prose = (text) => document.createTextNode(plain(withoutEntities(text)));

function safeAddress(href) {
  try {
    const url = new URL(withoutEntities(href)); // without a base: a relative address is none
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

function link(token, label) {
  const address = safeAddress(token.href);
  if (address === null) return prose(token.raw);
  const made = element("a");
  made.href = address;
  made.target = "_blank";
  made.rel = "noopener noreferrer nofollow";
  made.title = address; // what the label hides
  made.append(...label);
  return made;
}

function withInlines(made, token) {
  made.append(...inlines(token.tokens ?? [{ type: "text", text: token.text, raw: token.raw }]));
  return made;
}

const INLINE = {
  text: (token) => (token.tokens ? fragment(inlines(token.tokens)) : lines(token.text)),
  escape: (token) => prose(token.text),
  strong: (token) => withInlines(element("strong"), token),
  em: (token) => withInlines(element("em"), token),
  del: (token) => withInlines(element("del"), token),
  codespan: (token) => element("code", "", plainCode(token.text)),
  br: () => element("br"),
  link: (token) => link(token, inlines(token.tokens)),
  image: (token) => link(token, [prose(`🖼 ${token.text || token.href}`)]),
  formula: (token) => formula(token.tex, token.display),
  checkbox: (token) => prose(token.checked ? "☑ " : "☐ "),
};

function fragment(nodes) {
  const made = document.createDocumentFragment();
  made.append(...nodes);
  return made;
}

// The one tag that models write in tables, where a line cannot be broken otherwise.
function lines(text) {
  const parts = text.split(/<br\s{0,3}\/?>/i);
  return fragment(parts.flatMap((part, index) => (index ? [element("br"), prose(part)] : [prose(part)])));
}

const inlines = (tokens) => tokens.map((token) => (INLINE[token.type] ?? ((other) => prose(other.raw)))(token));

function codeBlock(token) {
  const made = element("div", "code");
  const head = add(made, "div", "code-head");
  add(head, "span", "", (token.lang ?? "").trim().split(/\s/)[0].slice(0, 40));
  addCopyButton(head, () => token.text);
  const box = add(made, "pre");
  box.tabIndex = 0; // so that a long line can be scrolled by keys
  add(box, "code", "", plainCode(token.text));
  return made;
}

function list(token) {
  const made = element(token.ordered ? "ol" : "ul");
  if (token.ordered && token.start !== 1) made.start = token.start;
  for (const item of token.items) add(made, "li").append(...blocks(item.tokens));
  return made;
}

function table(token) {
  const made = element("div", "table");
  made.tabIndex = 0;
  const body = add(made, "table");
  const row = (parent, name, cells) => {
    const line = add(parent, "tr");
    for (const cell of cells) withInlines(add(line, name, cell.align ? `to-${cell.align}` : ""), cell);
  };
  row(add(body, "thead"), "th", token.header);
  const rows = add(body, "tbody");
  for (const cells of token.rows) row(rows, "td", cells);
  return made;
}

function quote(token) {
  const made = element("blockquote");
  made.append(...blocks(token.tokens));
  return made;
}

const BLOCK = {
  space: () => null,
  def: () => null,
  hr: () => element("hr"),
  paragraph: (token) => withInlines(element("p"), token),
  text: (token) => withInlines(element("span"), token), // of an item in a tight list
  heading: (token) => withInlines(element(`h${Math.min(token.depth + 2, 6)}`), token),
  code: codeBlock,
  blockquote: quote,
  list,
  table,
  formulaBlock: (token) => formula(token.tex, true),
};

// Arabic and Hebrew run from the right; code and formulas do not.
const TAKES_DIRECTION = new Set(["p", "span", "h3", "h4", "h5", "h6", "ul", "ol", "blockquote"]);

function blocks(tokens) {
  const made = tokens.map((token) => (BLOCK[token.type] ?? INLINE[token.type] ?? asWritten)(token));
  for (const node of made) if (TAKES_DIRECTION.has(node?.localName) && !node.className) node.dir = "auto";
  return made.filter((node) => node !== null);
}

const asWritten = (token) => element("p", "as-written", plain(token.raw));

// The blocks of a text, with what is too long or too deep left as it was written.
function tokensOf(text, links) {
  if (NESTED.test(text)) return [{ type: "plain", raw: text }];
  try {
    const lexer = new Lexer(reader.defaults);
    Object.assign(lexer.tokens.links, links);
    lexer.blockTokens(text, lexer.tokens);
    lexer.inlineQueue = lexer.inlineQueue.filter(({ src, tokens }) => {
      const isShort = src.length <= LONGEST_PARAGRAPH;
      if (!isShort) tokens.push({ type: "escape", raw: src, text: src });
      return isShort;
    });
    for (const { src, tokens } of lexer.inlineQueue) lexer.inlineTokens(src, tokens);
    return [...lexer.tokens];
  } catch {
    return [{ type: "plain", raw: text }];
  }
}

// A text that grows at its end. Blocks that are complete are read once; only the last one is read again.
export class MarkdownView {
  constructor(box) {
    this.box = box;
    this.forget();
  }

  forget() {
    this.finished = ""; // what needs no second look
    this.links = {};
    this.last = []; // the nodes of what does
    this.box.replaceChildren();
  }

  write(text) {
    text = text.replace(/\r\n?/g, "\n");
    if (!text.startsWith(this.finished)) this.forget();
    const tail = text.slice(this.finished.length);
    const tokens = tokensOf(tail, this.links);
    for (const node of this.last) node.remove();
    const numFinished = this.numFinished(tokens, tail);
    this.box.append(...blocks(tokens.slice(0, numFinished)));
    this.last = blocks(tokens.slice(numFinished));
    this.box.append(...this.last);
    for (const { type, tag, href, title, raw } of tokens.slice(0, numFinished)) {
      this.finished += raw;
      if (type === "def") this.links[tag] ??= { href, title };
    }
    return this;
  }

  // Once it is whole it is read as a whole: "[1]: https://..." at its end makes links of what stands before.
  finish(text) {
    this.forget();
    return this.write(text);
  }

  // All up to the blank line before the last token: what comes next may still join what is after it ("***" is a rule,
  // "***a" goes on with the paragraph). And nothing from a formula on that is open.
  numFinished(tokens, tail) {
    let number = tokens.length - 1;
    while (number > 0 && tokens[number].type === "space") number -= 1;
    while (number > 0 && !BLANK_LINE_AT_END.test(tokens[number - 1].raw)) number -= 1;
    let place = 0;
    for (const [index, { type, raw }] of tokens.entries()) {
      const isOpen = type !== "formulaBlock" && OPENS_FORMULA.test(raw) && tail.length - place < LONGEST_OPEN;
      if (isOpen) number = Math.min(number, index);
      place += raw.length;
    }
    const isAsGiven = tokens.map((token) => token.raw).join("") === tail;
    return isAsGiven ? Math.max(number, 0) : 0;
  }
}

export function render(text) {
  const box = element("div");
  new MarkdownView(box).write(text);
  return fragment([...box.childNodes]);
}
