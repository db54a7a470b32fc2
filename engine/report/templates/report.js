"use strict";
(() => {
  const data = JSON.parse(document.getElementById("payload").textContent);
  const byId = (id) => document.getElementById(id);

  /** An element with properties and children; text is always set as text, never as markup. */
  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in element) element[name] = value;
      else element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  function format(value, digits = 3) {
    if (value === null || value === undefined) return "undefined";
    if (value === 0) return "0";
    const size = Math.abs(value);
    let text;
    if (size < 1e-4 || size >= 1e6) {
      const [mantissa, exponent] = size.toExponential(digits - 1).split("e");
      text = mantissa + " × 10" + [...String(Number(exponent))].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit] ?? "⁻").join("");
    } else {
      text = size.toFixed(Math.max(0, digits - 1 - Math.floor(Math.log10(size))));
    }
    return value < 0 ? "−" + text : text;
  }
  const signed = (value) => (value > 0 ? "+" : "") + format(value);
  const pValue = (p) => (p === null ? "undefined" : p < 1e-4 ? "< 0.0001" : p >= 0.9995 ? "1" : String(Number(p.toPrecision(2))));
  const percent = (share) => (100 * share).toFixed(share < 0.0995 ? 1 : 0) + " %";
  const withUnit = (text, unit) => (unit ? text + " " + unit : text);
  const swatch = (condition) => make("span", { className: "swatch c" + (condition % 6), "aria-hidden": "true" });

  function mix(stops, at) {
    const place = Math.min(Math.max(at, 0), 1) * (stops.length - 1);
    const index = Math.min(Math.floor(place), stops.length - 2);
    return stops[index].map((low, k) => Math.round(low + (place - index) * (stops[index + 1][k] - low)));
  }
  const css = (rgb) => "rgb(" + rgb.join(",") + ")";
  const gradient = (stops) => "linear-gradient(90deg," + stops.map(css).join(",") + ")";
  // Blue to red through near-white, told apart in every common form of colour blindness.
  const DIVERGING = [[5, 48, 97], [33, 102, 172], [67, 147, 195], [146, 197, 222], [209, 229, 240], [247, 247, 247],
    [253, 219, 199], [244, 165, 130], [214, 96, 77], [178, 24, 43], [103, 0, 31]];
  const SEQUENTIAL = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

  let openingLayer = data.layers[data.layers.length - 1];

  // ---- Layer × head maps -------------------------------------------------------------------------------------------
  if (data.maps.length) {
    const select = byId("map-metric");
    const grids = byId("map-grids");
    const detail = byId("map-detail");
    let chosen = { row: 0, head: 0 };
    data.maps.forEach((map, index) => select.append(make("option", { value: index }, map.label)));

    const headName = (head) => (head === data.heads ? "mean over heads" : "head " + head);
    const current = () => data.maps[Number(select.value)];

    /** The cell of a map with the largest change that survives, of the means over heads where there are such. */
    function largest(map) {
      const best = { row: 0, head: 0, size: -1 };
      for (const column of [[data.heads], [...Array(data.heads).keys()]]) {
        for (const grid of map.grids)
          grid.cells.forEach((cells, row) => column.forEach((head) => {
            const cell = cells[head];
            if (cell && cell.sure && Math.abs(cell.d) > best.size) Object.assign(best, { row, head, size: Math.abs(cell.d) });
          }));
        if (best.size >= 0) break;
      }
      return best;
    }

    function describe(cell) {
      if (!cell || cell.d === null) return "undefined";
      return signed(cell.d) + (cell.sure ? ", survives max-T" : ", does not survive max-T");
    }

    function drawMaps() {
      const map = current();
      const sizes = map.grids.flatMap((grid) => grid.cells.flat()).filter((cell) => cell && cell.d !== null);
      const limit = Math.max(...sizes.map((cell) => Math.abs(cell.d)), 0) || 1;
      grids.replaceChildren(...map.grids.map((grid) => drawGrid(map, grid, limit)));
      byId("map-scale").replaceChildren(
        make("span", {}, "−" + format(limit)),
        Object.assign(make("i"), { style: "background:" + gradient(DIVERGING) }),
        make("span", {}, withUnit("+" + format(limit), map.unit)),
      );
      choose(chosen.row, chosen.head);
    }

    function drawGrid(map, grid, limit) {
      const name = data.conditions[grid.condition] + " − " + data.conditions[grid.against];
      const table = make("table", { className: "heat", role: "grid", "aria-label": map.label + ", " + name + ": layers by heads" });
      const header = make("tr", { role: "row" }, make("th", { scope: "col", title: "layer by head" }, ""));
      for (let head = 0; head < data.heads; head++)
        header.append(make("th", { scope: "col", "aria-label": "head " + head }, String(head)));
      header.append(make("th", { className: "gap", role: "presentation" }));
      header.append(make("th", { scope: "col", "aria-label": "mean over heads", title: "mean over heads" }, "mean"));
      table.append(make("thead", {}, header));
      const body = make("tbody");
      grid.cells.forEach((cells, row) => {
        const line = make("tr", { role: "row" });
        line.append(make("th", { scope: "row", "aria-label": "layer " + data.layers[row], title: data.sites[row] }, String(data.layers[row])));
        cells.forEach((cell, head) => {
          const known = cell && cell.d !== null;
          if (head === data.heads) line.append(make("th", { className: "gap", role: "presentation" }));
          const square = make("td", {
            role: "gridcell", tabIndex: -1,
            "aria-label": "layer " + data.layers[row] + ", " + headName(head) + ": " + describe(cell),
          }, known && cell.sure ? "●" : "");
          if (known) {
            const full = mix(DIVERGING, 0.5 + 0.5 * cell.d / limit);
            // What does not survive is faded, or noise on a narrow scale would look like a finding.
            const rgb = cell.sure ? full : full.map((value) => Math.round(247 + 0.4 * (value - 247)));
            square.style.background = css(rgb);
            if (0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] < 120) square.classList.add("white");
          } else square.classList.add("none");
          square.dataset.row = row;
          square.dataset.head = head;
          line.append(square);
        });
        body.append(line);
      });
      table.append(body);
      const pick = (event) => {
        const cell = event.target.closest("td");
        if (cell) choose(Number(cell.dataset.row), Number(cell.dataset.head));
      };
      table.addEventListener("pointerover", (event) => { if (event.pointerType === "mouse") pick(event); });
      table.addEventListener("click", pick);
      table.addEventListener("focusin", pick);
      table.addEventListener("keydown", (event) => {
        const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
        if (!step) return;
        event.preventDefault();
        const row = Math.min(Math.max(chosen.row + step[0], 0), data.layers.length - 1);
        const head = Math.min(Math.max(chosen.head + step[1], 0), data.heads);
        choose(row, head);
        table.querySelector('td[data-row="' + row + '"][data-head="' + head + '"]').focus();
      });
      return make("figure", {}, make("figcaption", {}, swatch(grid.condition), name), table);
    }

    function choose(row, head) {
      chosen = { row, head };
      for (const cell of grids.querySelectorAll("td")) {
        const on = Number(cell.dataset.row) === row && Number(cell.dataset.head) === head;
        cell.classList.toggle("on", on);
        cell.tabIndex = on ? 0 : -1;
      }
      const map = current();
      const parts = [make("h3", {}, "Layer " + data.layers[row] + ", " + headName(head)), make("p", { className: "scope" }, map.label + " · " + data.sites[row])];
      parts.push(make("div", { className: "pairs" }, ...map.grids.map((grid) => make("div", {}, ...cellDetail(map, grid, grid.cells[row][head])))));
      const shown = data.viewer ? data.viewer.layers.findIndex((layer) => layer.layer === data.layers[row]) : -1;
      if (shown >= 0) {
        const go = make("button", { type: "button" }, "Show its attention");
        go.addEventListener("click", () => {
          byId("view-layer").value = shown;
          byId("view-layer").dispatchEvent(new Event("change"));
          byId("view-head").value = head === data.heads ? "mean" : head;
          byId("view-head").dispatchEvent(new Event("change"));
          byId("attention").scrollIntoView();
          byId("view-head").focus({ preventScroll: true });
        });
        parts.push(make("p", {}, go));
      }
      detail.replaceChildren(...parts);
    }

    function cellDetail(map, grid, cell) {
      const title = make("h4", {}, swatch(grid.condition), data.conditions[grid.condition] + " against " + data.conditions[grid.against]);
      if (!cell || cell.d === null) return [title, make("p", {}, "No value: undefined, or there is no such head in this layer.")];
      const rows = [["difference", withUnit(signed(cell.d), map.unit)]];
      if (cell.ci[0] !== null && cell.ci[1] !== null)
        rows.push([100 * data.confidence + " % CI", format(cell.ci[0]) + " to " + format(cell.ci[1])]);
      if (cell.a !== null && cell.b !== null) rows.push(["means", format(cell.a) + " → " + format(cell.b)]);
      rows.push(["dz", cell.dz === null ? "undefined" : format(cell.dz)]);
      rows.push(["p, max-T", pValue(cell.p) + (cell.sure ? " (survives)" : " (does not survive)")]);
      rows.push(["images", cell.n + (cell.missing ? " (" + cell.missing + " missing)" : "")]);
      if (cell.note) rows.push(["note", cell.note]);
      const list = make("dl");
      for (const [name, value] of rows) list.append(make("dt", {}, name), make("dd", {}, value));
      const parts = [title, list];
      if (cell.hist) {
        const most = Math.max(...cell.hist.counts);
        const bars = make("div", {
          className: "hist c" + (grid.condition % 6), role: "img",
          "aria-label": "Histogram of the paired differences of " + cell.n + " images, from " + format(cell.hist.low) + " to " + format(cell.hist.high),
        });
        for (const count of cell.hist.counts) bars.append(Object.assign(make("i"), { style: "height:" + (100 * count / most) + "%" }));
        const zero = -cell.hist.low / (cell.hist.high - cell.hist.low);
        bars.append(Object.assign(make("b"), { style: "left:calc(" + 100 * zero + "% - 1px)" }));
        parts.push(bars, make("div", { className: "ends" }, make("span", {}, format(cell.hist.low)), make("span", {}, "by image; stroke: 0"), make("span", {}, format(cell.hist.high))));
      }
      return parts;
    }

    select.addEventListener("change", drawMaps);
    const heads = data.heads;
    grids.style.setProperty("--cell", heads <= 6 ? "2.6rem" : "clamp(1rem, calc((100vw - 4.5rem) / " + (heads + 3.2) + "), 1.6rem)");
    // Open on what the page's first sentence speaks of: the largest regional change, else the first metric that changed.
    const regional = data.maps.filter((map) => map.regional && largest(map).size >= 0);
    regional.sort((one, other) => largest(other).size - largest(one).size);
    const opening = regional[0] ?? data.maps.find((map) => largest(map).size >= 0) ?? data.maps[0];
    select.value = data.maps.indexOf(opening);
    chosen = largest(opening);
    openingLayer = data.layers[chosen.row];
    drawMaps();
  }

  // ---- Attention of sample images ----------------------------------------------------------------------------------
  const viewer = data.viewer;
  if (viewer) {
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
      if (!decoded.has(key)) decoded.set(key, inflate(viewer.maps[key], viewer.layers[l]));
      return decoded.get(key);
    }

    async function inflate(text, at) {
      const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
      const content = await new Response(stream).arrayBuffer();
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
        const note = guess ? "predicts " + guess.name + " (" + percent(guess.probability) + ")" : "";
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
    layerSelect.value = Math.max(viewer.layers.findIndex((layer) => layer.layer === openingLayer), 0);
    fillHeads();
    build();
  }
})();
