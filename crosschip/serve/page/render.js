// A small, safe renderer for the Markdown that models write: paragraphs, lists, headings, code, bold and italic.
// Everything becomes text nodes of elements made here; no string is ever read as HTML, and there are no links.

const INLINE = /(`[^`\n]+`)|(\*\*[^*\n]+\*\*)|(\*[^*\s][^*\n]*\*)/;

function element(name, text) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  return made;
}

function addInline(parent, text) {
  let rest = text;
  for (let found = INLINE.exec(rest); found; found = INLINE.exec(rest)) {
    parent.append(rest.slice(0, found.index));
    const [whole, code, bold] = found;
    const inner = code || !bold ? whole.slice(1, -1) : whole.slice(2, -2);
    parent.append(element(code ? "code" : bold ? "strong" : "em", inner));
    rest = rest.slice(found.index + whole.length);
  }
  parent.append(rest);
  return parent;
}

// Each kind of line that is not running text: what it looks like, and the elements it becomes.
const BULLET = /^\s*[-*•]\s+(.*)$/;
const NUMBER = /^\s*(\d+)[.)]\s+(.*)$/;
const HEADING = /^#{1,6}\s+(.*)$/;
const FENCE = /^\s*```/;

export function render(text) {
  const blocks = document.createDocumentFragment();
  const lines = text.split("\n");
  let paragraph = [];
  let list = null;

  const endParagraph = () => {
    if (paragraph.length) blocks.append(addInline(element("p"), paragraph.join("\n")));
    paragraph = [];
  };
  const listOf = (kind, start) => {
    endParagraph();
    if (!list || list.localName !== kind) {
      list = element(kind);
      if (start !== undefined) list.start = start;
      blocks.append(list);
    }
    return list;
  };

  for (let i = 0; i < lines.length; i += 1) {
    const line = lines[i];
    let found;
    if (FENCE.test(line)) {
      endParagraph();
      const code = [];
      for (i += 1; i < lines.length && !FENCE.test(lines[i]); i += 1) code.push(lines[i]);
      const block = element("pre");
      block.append(element("code", code.join("\n")));
      blocks.append(block);
    } else if ((found = HEADING.exec(line))) {
      endParagraph();
      blocks.append(addInline(element("h3"), found[1]));
    } else if ((found = BULLET.exec(line))) {
      listOf("ul").append(addInline(element("li"), found[1]));
      continue;
    } else if ((found = NUMBER.exec(line))) {
      listOf("ol", Number(found[1])).append(addInline(element("li"), found[2]));
      continue;
    } else if (line.trim() === "") {
      endParagraph();
      continue; // a blank line between two items does not end their list
    } else {
      paragraph.push(line);
    }
    list = null;
  }
  endParagraph();
  return blocks;
}
