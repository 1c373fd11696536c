// Conversations in this browser's own database (IndexedDB). They leave it only towards the model that is asked.
import { newId } from "/conversation.js";

const NAME = "crosschip";
const STORE = "conversations";

const asPromise = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

// Async, so that a browser that throws at once is a problem like any other.
async function open() {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
  return asPromise(request);
}

// Where the browser keeps nothing (a private window, a full disk), the page goes on without, and says so.
export class ConversationStore {
  constructor(whenProblem, whenChangedElsewhere) {
    this.tellProblem = whenProblem;
    this.database = open().catch((error) => this.fail(error));
    this.channel = globalThis.BroadcastChannel ? new BroadcastChannel("crosschip") : null;
    this.channel?.addEventListener("message", (event) => whenChangedElsewhere(event.data.id));
    this.saving = Promise.resolve();
  }

  fail(error) {
    this.tellProblem(`Conversations are not being kept: ${error?.message || "this browser refuses to store them"}. Copy what you need.`);
    return null;
  }

  async all() {
    const database = await this.database;
    if (!database) return [];
    return asPromise(database.transaction(STORE).objectStore(STORE).getAll());
  }

  async get(id) {
    const database = await this.database;
    return database ? asPromise(database.transaction(STORE).objectStore(STORE).get(id)) : undefined;
  }

  // One after the other. A conversation that another tab has changed meanwhile is kept beside that one.
  save(conversation) {
    this.saving = this.saving.then(() => this.put(conversation)).catch((error) => this.fail(error));
    return this.saving;
  }

  async put(conversation) {
    const database = await this.database;
    if (!database) return;
    const transaction = database.transaction(STORE, "readwrite");
    const conversations = transaction.objectStore(STORE);
    const kept = await asPromise(conversations.get(conversation.id));
    if (kept && kept.revision !== conversation.revision) {
      conversation.id = newId();
      conversation.title = `${conversation.title} (from another tab)`;
    }
    conversation.revision += 1;
    await asPromise(conversations.put(conversation));
    this.channel?.postMessage({ id: conversation.id });
  }

  async remove(id) {
    await this.saving;
    const database = await this.database;
    if (database) await asPromise(database.transaction(STORE, "readwrite").objectStore(STORE).delete(id));
    this.channel?.postMessage({ id });
  }
}
