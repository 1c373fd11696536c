// This server's OpenAI-compatible API, and what can go wrong with it, in words.

export class Problem extends Error {
  constructor(message, { status = 0, retryAfterS = 0 } = {}) {
    super(message);
    this.status = status;
    this.retryAfterS = retryAfterS;
  }

  get wantsKey() {
    return this.status === 401 || this.status === 403;
  }
}

const NO_ANSWER = "The server does not answer. Is it still running?";

// One tab's: a key that is written down is a key that is found.
const KEY = "crosschip.key";
export const apiKey = () => sessionStorage.getItem(KEY) ?? "";
export const keepApiKey = (key) => sessionStorage.setItem(KEY, key);

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Problem(NO_ANSWER);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const { status } = response;
  const said = await response.json().then((body) => body.error?.message ?? body.detail, () => null);
  const told = asSentence(typeof said === "string" ? said : `status ${status} ${response.statusText}`);
  const retryAfterS = Math.min(Number.parseInt(response.headers.get("Retry-After"), 10) || 0, 3600);
  if (status === 401 || status === 403) return new Problem(`The server wants an API key: ${told}`, { status });
  if (status === 429) return new Problem(`The server has too much to do: ${told}`, { status, retryAfterS });
  if (status === 502 || status === 503 || status === 504) {
    return new Problem(`The server cannot answer now: ${told}`, { status, retryAfterS });
  }
  return new Problem(`The server refused: ${told}`, { status });
}

const asSentence = (text) => text.trim().replace(/[^.!?…]$/u, "$&.");

export async function listModels() {
  const response = await request("/v1/models");
  const list = await response.json().catch(() => null);
  if (!Array.isArray(list?.data) || !list.data.length) throw new Problem("The server names no model that it serves.");
  return list.data.map((card) => ({ ...card, crosschip: card.crosschip ?? list.crosschip ?? {} }));
}

// A gateway says in headers which of its engines answers: the engine's own chunks know no more than itself.
function toldByHeaders(headers) {
  const names = { engine: "X-Crosschip-Engine", chip: "X-Crosschip-Chip", certificate: "X-Crosschip-Certificate" };
  const told = Object.entries(names).map(([name, header]) => [name, headers.get(header)]);
  return Object.fromEntries(told.filter(([, value]) => value));
}

// The chunks of an answer as they come, and before them one that says what the headers tell. Ends without a word only where the server has said that it was the end.
export async function* streamAnswer(body, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      ...body,
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    }),
    signal,
  });
  yield { crosschip: toldByHeaders(response.headers) };
  let ended = false;
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = parsed(data);
    if (chunk.error) throw new Problem(`The server ended the answer: ${asSentence(String(chunk.error.message ?? "it does not say why"))}`);
    ended ||= Boolean(chunk.choices?.[0]?.finish_reason);
    yield chunk;
  }
  if (!ended) throw new Problem("The server stopped in the middle of the answer.");
}

function parsed(data) {
  let chunk = null;
  try {
    chunk = JSON.parse(data);
  } catch {
    // told below
  }
  if (chunk === null || typeof chunk !== "object") {
    throw new Problem(`The server sent what is no part of an answer: ${data.slice(0, 80)}`);
  }
  return chunk;
}

// The data of server-sent events: parted by blank lines, several data lines to an event, comments left out.
async function* events(stream, signal) {
  const decoder = new TextDecoder();
  let text = "";
  let data = [];
  for await (const bytes of parts(stream, signal)) {
    text += decoder.decode(bytes, { stream: true });
    const lines = text.split("\n");
    text = lines.pop();
    for (const line of lines.map((whole) => whole.replace(/\r$/, ""))) {
      if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      else if (line === "" && data.length) {
        yield data.join("\n");
        data = [];
      }
    }
  }
}

// Not every browser can iterate a stream yet.
async function* parts(stream, signal) {
  const reader = stream.getReader();
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Problem("The connection to the server was lost in the middle of the answer.");
  } finally {
    reader.cancel().catch(() => {}); // whoever stops reading also stops the server's work
  }
}
