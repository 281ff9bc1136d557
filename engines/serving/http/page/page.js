// What is served, read from /stats each second; charts of it, and a picture to try.

import { drawLines, drawSteps } from "./charts.js";
import { showPicture } from "./picture.js";

const SPAN = 300, EACH = 1000;
const find = (id) => document.getElementById(id);
let chosen = null, latest = null;

// The server's steps of the last minutes, and the last seconds as the point of now.
function list(model, now) {
  const { latency_ms, images_per_s, accuracy_served } = model.lately;
  const { p50 = null, p99 = null } = latency_ms ?? {};
  return [...model.history.filter(({ at }) => at > now - SPAN), { at: now, p50, p99, images_per_s, accuracy_served }];
}

function showModels(models) {
  if (!models.some(({ name }) => name === chosen)) chosen = models[0]?.name ?? null;
  find("models").replaceChildren(...models.map(({ name }) => {
    const button = document.createElement("button");
    button.textContent = name;
    button.setAttribute("aria-current", String(name === chosen));
    button.onclick = () => { chosen = name; find("answers").replaceChildren(); show(); };
    return button;
  }));
}

const write = (number, digits, unit) => (number === null || number === undefined ? "–" : `${number.toFixed(digits)}${unit}`);

function showFigures(model) {
  const { lately, policy } = model, p99 = lately.latency_ms?.p99 ?? null;
  const late = policy.slo_ms !== null && p99 !== null && p99 > policy.slo_ms;
  const rows = [
    ["variant in force", model.variant + (policy.pinned ? " (pinned)" : "")],
    ["99 % within", write(p99, 1, " ms"), p99 === null ? "" : late ? "bad" : "good"],
    ["wanted within", write(policy.slo_ms, 0, " ms")],
    ["images a second", write(lately.images_per_s, 1, "")],
    ["accuracy served", write(lately.accuracy_served, 2, " %")],
    ["waiting", String(model.queue.images)],
    ["answered late", String(model.slo_misses)],
    ["turned away", String(model.turned_away)],
  ];
  find("figures").replaceChildren(...rows.map(([name, value, kind = ""]) => {
    const box = document.createElement("div"), term = document.createElement("dt"), figure = document.createElement("dd");
    term.textContent = name; figure.textContent = value; figure.className = kind;
    box.append(term, figure);
    return box;
  }));
  find("about").textContent =
    `${model.model}, ${model.precision}, ${model.backend}; policy ${policy.name}; ` +
    model.variants.map((v) => `${v.name} ${v.requests}`).join(", ") + " requests.";
}

function show() {
  if (latest === null) return;
  showModels(latest.models);
  const model = latest.models.find(({ name }) => name === chosen);
  if (!model) return;
  const now = latest.now, since = now - SPAN, points = list(model, now);
  const line = (key) => points.map((point) => [point.at, point[key] ?? null]);
  showFigures(model);
  drawSteps(find("variants"), model.changes.map(({ at, variant }) => [at, variant]), model.variants.map((v) => v.name), since, now);
  drawLines(find("latency"), [{ points: line("p99"), kind: "two" }, { points: line("p50"), kind: "one" }], since, now, { limit: model.policy.slo_ms, unit: " ms" });
  drawLines(find("throughput"), [{ points: line("images_per_s"), kind: "one" }], since, now);
  const known = model.variants.map((v) => v.accuracy).filter((a) => a !== null);
  find("accuracy").parentElement.hidden = known.length < model.variants.length;
  if (known.length === model.variants.length) {
    const span = Math.max(...known) - Math.min(...known) || 1;
    drawLines(find("accuracy"), [{ points: line("accuracy_served"), kind: "one" }], since, now, { unit: " %", least: Math.min(...known) - span / 4 });
  }
}

async function read() {
  const state = find("state");
  try {
    const response = await fetch("stats", { cache: "no-store" });
    if (!response.ok) throw new Error(response.statusText);
    latest = await response.json();
    state.textContent = latest.stopping ? "stopping" : `version ${latest.version}`;
    document.body.className = "";
    show();
  } catch {
    state.textContent = "no connection; trying again";
    document.body.className = "lost";
  }
  setTimeout(read, EACH);
}

async function take(file) {
  if (!file || latest === null) return;
  const model = latest.models.find(({ name }) => name === chosen);
  await showPicture(file, chosen, model.variants.map((v) => v.name), find("answers"), find("complaint"));
}

const drop = find("drop");
find("file").addEventListener("change", (event) => take(event.target.files[0]));
drop.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  take(event.dataTransfer.files[0]);
});
addEventListener("resize", show);
read();
