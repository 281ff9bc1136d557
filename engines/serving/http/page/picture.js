// A picture through every variant: its classes, how long it took, and which patches became one.

const LINE = "#fff", PRUNED = [24, 24, 24];

function element(kind, text, className) {
  const node = document.createElement(kind);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

// Ask one variant; the answer of /patches, or an Error whose message is the server's.
async function ask(model, variant, file, seen) {
  const place = `v2/models/${encodeURIComponent(model)}/versions/${encodeURIComponent(variant)}/patches?top_k=5&seen=${seen}`;
  const response = await fetch(place, { method: "POST", body: file });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

async function load(address) {
  const image = new Image();
  image.src = address;
  await image.decode();
  return image;
}

// Each patch in the mean colour of its token, and lines between tokens.
function drawPatches(canvas, image, grid, map) {
  const [rows, columns] = grid, cell = Math.max(8, Math.ceil(240 / rows));
  const width = image.naturalWidth, height = image.naturalHeight;
  const small = document.createElement("canvas");
  small.width = width; small.height = height;
  const read = small.getContext("2d", { willReadFrequently: true });
  read.drawImage(image, 0, 0);
  const { data } = read.getImageData(0, 0, width, height);
  const high = height / rows, wide = width / columns;
  const sums = new Map();
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const token = map[Math.min(rows - 1, Math.floor(y / high)) * columns + Math.min(columns - 1, Math.floor(x / wide))];
      const sum = sums.get(token) ?? [0, 0, 0, 0], at = 4 * (y * width + x);
      sum[0] += data[at]; sum[1] += data[at + 1]; sum[2] += data[at + 2]; sum[3] += 1;
      sums.set(token, sum);
    }
  }
  canvas.width = columns * cell; canvas.height = rows * cell;
  const draw = canvas.getContext("2d");
  const token = (y, x) => map[y * columns + x];
  for (let y = 0; y < rows; y++) {
    for (let x = 0; x < columns; x++) {
      const [r, g, b, n] = sums.get(token(y, x));
      const colour = token(y, x) < 0 ? PRUNED : [r / n, g / n, b / n].map(Math.round);
      draw.fillStyle = `rgb(${colour.join(",")})`;
      draw.fillRect(x * cell, y * cell, cell, cell);
    }
  }
  draw.fillStyle = LINE;
  for (let y = 0; y < rows; y++) {
    for (let x = 0; x < columns; x++) {
      if (x + 1 < columns && token(y, x) !== token(y, x + 1)) draw.fillRect((x + 1) * cell - 1, y * cell, 1, cell);
      if (y + 1 < rows && token(y, x) !== token(y + 1, x)) draw.fillRect(x * cell, (y + 1) * cell - 1, cell, 1);
    }
  }
}

function list(classes) {
  const found = element("ol");
  for (const { name, probability } of classes) {
    const row = element("li"), bar = element("i");
    bar.style.width = `${100 * probability}%`;
    row.append(bar, element("span", name), element("span", `${(100 * probability).toFixed(1)} %`));
    found.append(row);
  }
  return found;
}

// As `build` counts: all tokens, and those that are of patches.
function say({ map, tokens, others }) {
  const all = `${map.length} patches, ${tokens + others} tokens left`;
  return others ? `${all}, ${tokens} of them of patches` : all;
}

function card(answer, image) {
  const box = element("article"), title = element("h3", answer.model_version);
  box.dataset.variant = answer.model_version;
  title.append(element("span", `${answer.answered_ms.toFixed(1)} ms`));
  if (answer.map) {
    const canvas = element("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${answer.map.length} patches became ${answer.tokens} tokens`);
    drawPatches(canvas, image, answer.grid, answer.map);
    box.append(canvas, title, element("p", say(answer)));
  } else {
    box.append(title, element("p", answer.no_map));
  }
  if (answer.classes) box.append(list(answer.classes));
  return box;
}

// Show a file: the picture as the model sees it, then a card for each variant, one by one.
export async function showPicture(file, model, variants, answers, complaint) {
  complaint.textContent = "";
  answers.replaceChildren();
  let image = null;
  for (const variant of variants) {
    try {
      const answer = await ask(model, variant, file, image === null ? 1 : 0);
      if (image === null) {
        image = await load(answer.seen);
        const box = element("article");
        box.append(image, element("h3", "the picture"), element("p", `as the model sees it, ${image.naturalWidth} × ${image.naturalHeight}`));
        image.alt = file.name;
        answers.append(box);
      }
      answers.append(card(answer, image));
    } catch (error) {
      complaint.textContent = `${variant}: ${error.message}`;
      return;
    }
  }
}
