// What answers: the model, its chip, its certificate, and what the server warns of.
import { $, add, count, element, plain } from "/dom.js";
import { showDefaults } from "/settings.js";

export function showCertificate(status) {
  const banner = $("certificate");
  banner.hidden = status.certificate === "CERTIFIED";
  banner.replaceChildren();
  add(banner, "strong", "", "UNCERTIFIED");
  banner.append(": nothing shows that this model answers here as it did on the chip that trained it");
  if (status.certificate_problem) banner.append(` (${plain(status.certificate_problem)})`);
}

// Warnings of the server about itself, such as a drift that the parity watch has found.
export function showAlarms(status) {
  const alarms = Array.isArray(status.alarms) ? status.alarms.filter((alarm) => typeof alarm === "string") : [];
  $("alarm").hidden = alarms.length === 0;
  $("alarm").textContent = plain(alarms.join("\n"));
}

function factsOf(about) {
  const facts = [];
  if (about.num_parameters) facts.push(`${(about.num_parameters / 1e6).toFixed(1)} M parameters`);
  if (about.dtype) facts.push(about.dtype);
  if (Array.isArray(about.engines)) facts.push(`${about.engines.filter((engine) => engine.up).length} of ${count(about.engines.length, "engine")} up`);
  else if (about.chip) facts.push(about.chip);
  if (about.weights_version !== undefined) facts.push(`weights version ${about.weights_version}`);
  return plain(facts.join(" · "));
}

export function showModel(card) {
  const about = card.crosschip;
  document.title = `${card.id} · crosschip`;
  $("model-name").textContent = card.id;
  $("model-facts").textContent = factsOf(about);
  $("model-facts").title = about.model_dir ?? "";
  showDefaults(card);
  showCertificate(about);
  showAlarms(about);
}

export function showChoice(cards, chosen) {
  const choice = $("model-choice");
  choice.hidden = cards.length < 2;
  $("model-name").hidden = cards.length >= 2;
  choice.replaceChildren(...cards.map((card) => {
    const option = element("option", "", card.id);
    option.value = card.id;
    option.selected = card.id === chosen.id;
    return option;
  }));
}

// Why a model cannot chat, or nothing. A server that does not say is taken to.
export function whyNoChat(card) {
  const about = card.crosschip;
  if (about.has_chat_template !== false) return "";
  return about.has_tokenizer ? "chat template" : "tokenizer";
}
