// Small charts over time, as SVG: lines, steps, and a limit.

const NS = "http://www.w3.org/2000/svg";
const WIDTH = 1000, HEIGHT = 92, LEFT = 62, BOTTOM = 14;

function make(kind, attributes, text) {
  const node = document.createElementNS(NS, kind);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function frame(place, width) {
  const svg = make("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
  place.replaceChildren(svg);
  return svg;
}

// Points [seconds, number or null] as a path; `steps` holds each number until the next.
function path(points, x, y, steps) {
  let text = "", last = null;
  for (const [at, value] of points) {
    if (value === null) { last = null; continue; }
    const here = `${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
    if (last === null) text += `M${here}`;
    else text += (steps ? `L${x(at).toFixed(1)} ${y(last).toFixed(1)}` : "") + `L${here}`;
    last = value;
  }
  return text;
}

// Round numbers, three to five of them, from at most `least` to at least `most`.
function listTicks(least, most) {
  const rough = (most - least || 1) / 3, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const first = Math.floor(least / step + 1e-9), last = Math.max(first + 1, Math.ceil(most / step - 1e-9));
  return Array.from({ length: last - first + 1 }, (_, n) => Number(((first + n) * step).toPrecision(10)));
}

// Lines [{points, kind}] between two times, from `least` to what the largest needs.
export function drawLines(place, lines, since, now, { limit = null, unit = "", least: lowest = 0 } = {}) {
  const width = Math.max(320, place.clientWidth || WIDTH);
  const svg = frame(place, width);
  const all = lines.flatMap(({ points }) => points.map((p) => p[1])).filter((v) => v !== null);
  const ticks = listTicks(lowest, Math.max(...all, limit ?? 0, lowest + 1e-9));
  const least = ticks[0], most = ticks[ticks.length - 1];
  const x = (at) => LEFT + ((at - since) / (now - since)) * (width - LEFT);
  const y = (v) => HEIGHT - BOTTOM - ((v - least) / (most - least)) * (HEIGHT - BOTTOM - 8);
  for (const value of ticks) {
    svg.append(make("line", { class: "grid", x1: LEFT, x2: width, y1: y(value), y2: y(value) }));
    svg.append(make("text", { x: 0, y: y(value) + 4 }, `${value}${unit}`));
  }
  if (limit !== null) svg.append(make("path", { class: "limit", d: `M${LEFT} ${y(limit)}L${width} ${y(limit)}` }));
  for (const { points, kind } of lines) svg.append(make("path", { class: kind, d: path(points, x, y, false) }));
}

// Which of some names was in force: [seconds, name], the first name on top.
export function drawSteps(place, changes, names, since, now) {
  const width = Math.max(320, place.clientWidth || WIDTH);
  const svg = frame(place, width);
  const x = (at) => LEFT + ((Math.max(at, since) - since) / (now - since)) * (width - LEFT);
  const y = (name) => 10 + (names.indexOf(name) / Math.max(1, names.length - 1)) * (HEIGHT - BOTTOM - 14);
  for (const name of names) {
    svg.append(make("line", { class: "grid", x1: LEFT, x2: width, y1: y(name), y2: y(name) }));
    svg.append(make("text", { x: 0, y: y(name) + 4 }, name));
  }
  const before = changes.filter(([at]) => at <= since).slice(-1);
  const points = [...before, ...changes.filter(([at]) => at > since)];
  if (points.length) points.push([now, points[points.length - 1][1]]);
  svg.append(make("path", { class: "one", d: path(points, x, y, true) }));
}
