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

// Lines [{points, kind}] between two times, from zero to what the largest needs.
export function drawLines(place, lines, since, now, { limit = null, unit = "", from = 0 } = {}) {
  const width = Math.max(320, place.clientWidth || WIDTH);
  const svg = frame(place, width);
  const all = lines.flatMap(({ points }) => points.map((p) => p[1])).filter((v) => v !== null);
  const most = Math.max(...all, limit ?? 0, from + 1e-9) * 1.08;
  const least = from === null ? Math.min(...all, limit ?? Infinity) : from;
  const x = (at) => LEFT + ((at - since) / (now - since)) * (width - LEFT);
  const y = (v) => HEIGHT - BOTTOM - ((v - least) / (most - least || 1)) * (HEIGHT - BOTTOM - 8);
  for (const value of [least, (least + most) / 2, most]) {
    svg.append(make("line", { class: "grid", x1: LEFT, x2: width, y1: y(value), y2: y(value) }));
    svg.append(make("text", { x: 0, y: y(value) + 4 }, `${show(value)}${unit}`));
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

function show(value) {
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}
