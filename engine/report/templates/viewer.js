
/** Real attention of the sample images: a query patch, and where it attends in every condition. */
(() => {
  const { data, byId, make, percent, swatch, mix, css, gradient, SEQUENTIAL } = page;
  const viewer = data.viewer;
  if (!viewer) return;

  const SIDE = 336; // canvas pixels along the image's longer side
  const panels = byId("view-panels");
  const status = byId("view-status");
  const imageSelect = byId("view-image"), layerSelect = byId("view-layer"), headSelect = byId("view-head");
  const classButton = byId("view-class"), overlay = byId("view-overlay");
  const decoded = new Map();
  let query = null; // token index; the class token is 0 where there is one
  let readout = null; // patch pointed at in a map
  let drawing = 0;

  viewer.images.forEach((image, i) => imageSelect.append(make("option", { value: i }, image.id + " (class " + image.label + ")")));
  viewer.layers.forEach((layer, l) => layerSelect.append(make("option", { value: l, title: layer.site }, String(layer.layer))));

  const layer = () => viewer.layers[Number(layerSelect.value)];
  const image = () => viewer.images[Number(imageSelect.value)];

  function fillHeads() {
    const before = headSelect.value;
    headSelect.replaceChildren(make("option", { value: "mean" }, "mean of " + layer().heads));
    for (let head = 0; head < layer().heads; head++) headSelect.append(make("option", { value: head }, String(head)));
    headSelect.value = [...headSelect.options].some((option) => option.value === before) ? before : "mean";
    classButton.hidden = !layer().classToken;
  }

  /** The kept token nearest to a patch: on large models only some rows of the map are in the page. */
  function nearest(row, col) {
    const at = layer();
    let best = null, least = Infinity;
    for (const token of at.queries) {
      if (token < at.prefix) continue;
      const r = Math.floor((token - at.prefix) / at.cols), c = (token - at.prefix) % at.cols;
      const distance = (r - row) ** 2 + (c - col) ** 2;
      if (distance < least) { least = distance; best = token; }
    }
    return best;
  }

  async function maps(i, run, l) {
    const key = i + "/" + run + "/" + l;
    if (!decoded.has(key)) decoded.set(key, unpack(viewer.maps[key], viewer.layers[l]));
    return decoded.get(key);
  }

  async function unpack(text, at) {
    const content = await page.inflate(text);
    const rows = at.heads * at.queries.length;
    return {
      greatest: new Float32Array(content, 0, rows),
      prefix: new Float32Array(content, 4 * rows, rows),
      weights: new Uint8Array(content, 8 * rows),
    };
  }

  /** Shares of the attention on patches and the mass on prefix tokens, of one head or the mean over heads. */
  function shares(found, at, token) {
    const patches = at.rows * at.cols, position = at.queries.indexOf(token);
    const heads = headSelect.value === "mean" ? [...Array(at.heads).keys()] : [Number(headSelect.value)];
    const out = new Float64Array(patches);
    let prefix = 0;
    for (const head of heads) {
      const row = head * at.queries.length + position;
      const start = row * patches;
      let total = 0;
      for (let k = 0; k < patches; k++) total += found.weights[start + k];
      if (total > 0) for (let k = 0; k < patches; k++) out[k] += found.weights[start + k] / total / heads.length;
      prefix += found.prefix[row] / heads.length;
    }
    return { out, prefix };
  }

  function coverage(at, box) {
    const height = image().height / at.rows, width = image().width / at.cols, out = new Float64Array(at.rows * at.cols);
    for (let r = 0; r < at.rows; r++) for (let c = 0; c < at.cols; c++) {
      const down = Math.min(box[2], (r + 1) * height) - Math.max(box[0], r * height);
      const across = Math.min(box[3], (c + 1) * width) - Math.max(box[1], c * width);
      out[r * at.cols + c] = Math.max(0, down) * Math.max(0, across) / (height * width);
    }
    return out;
  }

  let pictures = [];
  function build() {
    const scale = SIDE / Math.max(image().width, image().height);
    const width = Math.round(image().width * scale), height = Math.round(image().height * scale);
    const source = panel("Image", "class " + image().label, width, height);
    source.canvas.tabIndex = 0;
    source.canvas.setAttribute("role", "application");
    source.canvas.setAttribute("aria-roledescription", "patch picker");
    source.canvas.setAttribute("aria-label", "Choose the query patch with the arrow keys");
    source.canvas.addEventListener("pointermove", (event) => { if (event.pointerType === "mouse") pickQuery(source.canvas, event); });
    source.canvas.addEventListener("click", (event) => pickQuery(source.canvas, event));
    source.canvas.addEventListener("keydown", moveQuery);
    pictures = viewer.runs.map((run) => {
      const guess = run.predictions ? run.predictions[Number(imageSelect.value)] : null;
      const note = [viewer.seeds ? "seed " + run.seed : "", guess ? "predicts " + guess.name + " (" + percent(guess.probability) + ")" : ""].filter(Boolean).join(" · ");
      const made = panel(data.conditions[run.condition], note, width, height, run.condition);
      made.canvas.setAttribute("role", "img");
      made.canvas.addEventListener("pointermove", (event) => { readout = patchAt(made.canvas, event); draw(); });
      made.canvas.addEventListener("click", (event) => { readout = patchAt(made.canvas, event); draw(); });
      made.canvas.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") { readout = null; draw(); } });
      return made;
    });
    pictures.unshift(source);
    panels.replaceChildren(...pictures.map((made) => made.figure));
    const loaded = new Image();
    loaded.onload = () => { pictures.forEach((made) => { made.image = loaded; }); draw(); };
    loaded.src = image().src;
  }

  function panel(title, note, width, height, condition) {
    const canvas = make("canvas", { width, height });
    const caption = make("figcaption", {}, condition === undefined ? null : swatch(condition), title);
    const text = make("p", {}, note), values = make("p");
    return { figure: make("figure", {}, caption, canvas, text, values), canvas, values, title };
  }

  function patchAt(canvas, event) {
    const frame = canvas.getBoundingClientRect(), at = layer();
    const clamp = (value, size) => Math.min(Math.max(Math.floor(value), 0), size - 1);
    return {
      row: clamp((event.clientY - frame.top) / frame.height * at.rows, at.rows),
      col: clamp((event.clientX - frame.left) / frame.width * at.cols, at.cols),
    };
  }

  function pickQuery(canvas, event) {
    const patch = patchAt(canvas, event);
    setQuery(nearest(patch.row, patch.col));
  }

  function moveQuery(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const at = layer();
    const patch = query < at.prefix ? Math.floor(at.rows / 2) * at.cols + Math.floor(at.cols / 2) : query - at.prefix;
    const clamp = (value, size) => Math.min(Math.max(value, 0), size - 1);
    setQuery(nearest(clamp(Math.floor(patch / at.cols) + step[0] * viewer.stride, at.rows), clamp(patch % at.cols + step[1] * viewer.stride, at.cols)));
  }

  function setQuery(token) {
    if (token === null || token === query) return;
    query = token;
    draw();
  }

  const queryName = () => {
    const at = layer();
    if (query < at.prefix) return "class token";
    const patch = query - at.prefix;
    return "patch in row " + Math.floor(patch / at.cols) + ", column " + patch % at.cols;
  };

  async function draw() {
    const turn = ++drawing, i = Number(imageSelect.value), l = Number(layerSelect.value), at = layer();
    if (!at.queries.includes(query)) query = at.classToken ? 0 : nearest(Math.floor(at.rows / 2), Math.floor(at.cols / 2));
    classButton.setAttribute("aria-pressed", String(query < at.prefix));
    let found;
    try {
      found = await Promise.all(viewer.runs.map((_, run) => maps(i, run, l)));
    } catch (error) {
      status.textContent = "This browser cannot unpack the maps (it lacks DecompressionStream); any browser from 2023 on can.";
      return;
    }
    if (turn !== drawing) return; // a later choice has overtaken this one
    const all = found.map((map) => shares(map, at, query));
    const limit = Math.max(...all.map((one) => Math.max(...one.out))) || 1;
    const boxes = image().boxes.map((box) => ({ ...box, share: coverage(at, box.box) }));
    drawSource(pictures[0], at, boxes);
    all.forEach((one, run) => drawMap(pictures[run + 1], at, one, limit, boxes));
    byId("view-scale").replaceChildren(
      make("span", {}, "0 %"), Object.assign(make("i"), { style: "background:" + gradient(SEQUENTIAL) }),
      make("span", {}, percent(limit) + " of the attention on patches, the same scale in every map"),
    );
    const head = headSelect.value === "mean" ? "mean over heads" : "head " + headSelect.value;
    status.textContent = "From the " + queryName() + ", layer " + at.layer + ", " + head + ".";
  }

  function frame(made, at, patch, color) {
    const context = made.canvas.getContext("2d"), w = made.canvas.width / at.cols, h = made.canvas.height / at.rows;
    context.lineWidth = 5; context.strokeStyle = "#000";
    context.strokeRect(patch.col * w, patch.row * h, w, h);
    context.lineWidth = 2.5; context.strokeStyle = color;
    context.strokeRect(patch.col * w, patch.row * h, w, h);
  }

  function drawBoxes(made, boxes) {
    const context = made.canvas.getContext("2d"), scale = made.canvas.width / image().width;
    context.save();
    boxes.forEach((box, index) => {
      const [top, left, bottom, right] = box.box.map((edge) => edge * scale);
      context.setLineDash(index % 2 ? [7, 5] : []);
      context.lineWidth = 2; context.strokeStyle = "rgba(255,255,255,.9)";
      context.strokeRect(left, top, right - left, bottom - top);
    });
    context.restore();
  }

  function drawSource(made, at, boxes) {
    const context = made.canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.clearRect(0, 0, made.canvas.width, made.canvas.height);
    if (made.image) context.drawImage(made.image, 0, 0, made.canvas.width, made.canvas.height);
    drawBoxes(made, boxes);
    if (query >= at.prefix) {
      const patch = query - at.prefix;
      frame(made, at, { row: Math.floor(patch / at.cols), col: patch % at.cols }, "#ff4fd8");
    }
    const names = boxes.map((box, index) => (index % 2 ? "dashed: " : "box: ") + box.name);
    made.values.textContent = names.join(" · ");
  }

  function drawMap(made, at, one, limit, boxes) {
    const context = made.canvas.getContext("2d"), w = made.canvas.width / at.cols, h = made.canvas.height / at.rows;
    context.imageSmoothingEnabled = false;
    context.clearRect(0, 0, made.canvas.width, made.canvas.height);
    if (overlay.checked && made.image) {
      context.filter = "grayscale(1)";
      context.drawImage(made.image, 0, 0, made.canvas.width, made.canvas.height);
      context.filter = "none";
      context.globalAlpha = 0.68;
    }
    for (let k = 0; k < one.out.length; k++) {
      context.fillStyle = css(mix(SEQUENTIAL, one.out[k] / limit));
      const row = Math.floor(k / at.cols), col = k % at.cols;
      context.fillRect(Math.round(col * w), Math.round(row * h), Math.ceil(w), Math.ceil(h));
    }
    context.globalAlpha = 1;
    drawBoxes(made, boxes);
    if (query >= at.prefix) {
      const patch = query - at.prefix;
      frame(made, at, { row: Math.floor(patch / at.cols), col: patch % at.cols }, "#ff4fd8");
    }
    const facts = [percent(one.prefix) + " on prefix tokens"];
    for (const box of boxes) {
      let mass = 0;
      one.out.forEach((share, k) => { mass += share * box.share[k]; });
      facts.push(percent(mass) + " of the rest on " + box.name);
    }
    if (readout && readout.row < at.rows && readout.col < at.cols) {
      frame(made, at, readout, "#ffffff");
      facts.push("row " + readout.row + ", column " + readout.col + ": " + percent(one.out[readout.row * at.cols + readout.col]));
    }
    made.values.textContent = facts.join(" · ");
    let top = 0;
    one.out.forEach((share, k) => { if (share > one.out[top]) top = k; });
    made.canvas.setAttribute("aria-label", made.title + ": most attention, " + percent(one.out[top]) + ", on row " +
      Math.floor(top / at.cols) + ", column " + top % at.cols + "; " + facts.join("; "));
  }

  imageSelect.addEventListener("change", () => { readout = null; build(); });
  layerSelect.addEventListener("change", () => { fillHeads(); draw(); });
  headSelect.addEventListener("change", draw);
  overlay.addEventListener("change", draw);
  classButton.addEventListener("click", () => setQuery(0));
  fillHeads();
  layerSelect.value = viewer.layers.length - 1;
  fillHeads();
  build();

  page.viewer = {
    /** Position of a layer by its number, of an image by its id; −1 where it was not kept. */
    layer: (number) => viewer.layers.findIndex((layer) => layer.layer === number),
    image: (id) => viewer.images.findIndex((image) => image.id === id),
    /** Shows a layer and head, and an image where one is named. */
    open({ image, layer, head }) {
      layerSelect.value = layer;
      fillHeads();
      headSelect.value = head;
      if (image !== undefined) imageSelect.value = image;
      readout = null;
      build();
    },
    /** The same, and goes there. */
    show(what) {
      page.viewer.open(what);
      byId("attention").scrollIntoView();
      headSelect.focus({ preventScroll: true });
    },
  };
})();
