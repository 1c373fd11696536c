// What the user sets: instructions, sampling, the look. Kept in this browser; the API key for this tab alone.
import { $, addButton } from "/dom.js";
import { apiKey, keepApiKey } from "/api.js";

const KEY = "crosschip.settings";

// The API's names, each with its field. An empty field leaves the choice to the model's own settings.
const SAMPLING = {
  temperature: "temperature",
  top_p: "top-p",
  top_k: "top-k",
  min_p: "min-p",
  presence_penalty: "presence-penalty",
  frequency_penalty: "frequency-penalty",
  repetition_penalty: "repetition-penalty",
  seed: "seed",
  max_tokens: "max-tokens",
};
const UNTOLD = Object.fromEntries(Object.values(SAMPLING).map((id) => [id, $(id).placeholder]));
const KEPT = ["system", "stop-strings", "theme", ...Object.values(SAMPLING)];

function read() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) ?? {};
  } catch {
    return {}; // not ours, or a browser that keeps nothing
  }
}

function keep() {
  const values = Object.fromEntries(KEPT.map((id) => [id, $(id).value]));
  try {
    localStorage.setItem(KEY, JSON.stringify(values));
  } catch {
    // they hold until the page is closed
  }
}

function wear(theme) {
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

export const instructions = () => $("system").value.trim();

// The sampling parameters that are set. A field whose value is no number, or out of range, is told by the browser.
export function samplingParameters() {
  const chosen = {};
  for (const [name, id] of Object.entries(SAMPLING)) {
    if ($(id).value !== "") chosen[name] = Number($(id).value);
  }
  const stops = $("stop-strings").value.split("\n").filter((line) => line !== "");
  return stops.length ? { ...chosen, stop: stops } : chosen;
}

// Whether every field can be sent; the first that cannot is shown, with the browser's own words.
export function settingsAreValid() {
  const form = $("settings");
  if (form.checkValidity()) return true;
  showSettings(true);
  form.reportValidity();
  return false;
}

export function showSettings(shown) {
  $("settings").hidden = !shown;
  $("settings-button").setAttribute("aria-expanded", String(shown));
}

export function askForKey() {
  showSettings(true);
  $("api-key").focus();
}

// What holds where the user sets nothing: the model's own, or what the page says of a model that does not tell.
export function showDefaults(card) {
  const told = { ...card.crosschip.default_sampling };
  if (card.max_model_len) told.max_tokens = `up to ${card.max_model_len}`;
  for (const [name, id] of Object.entries(SAMPLING)) $(id).placeholder = told[name] ?? UNTOLD[id];
}

export function setUpSettings(whenKeyChanges) {
  const kept = read();
  for (const id of KEPT) if (typeof kept[id] === "string") $(id).value = kept[id];
  $("api-key").value = apiKey();
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  $("settings").addEventListener("input", () => { keep(); wear($("theme").value); });
  $("api-key").addEventListener("change", () => { keepApiKey($("api-key").value.trim()); whenKeyChanges(); });
  $("settings-button").addEventListener("click", () => showSettings($("settings").hidden));
  addButton($("settings-end"), "quiet", "The model's own settings", () => {
    for (const id of ["stop-strings", ...Object.values(SAMPLING)]) $(id).value = "";
    keep();
  });
}
