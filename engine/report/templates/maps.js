
/** Layer × head maps, and what lies behind a cell: its numbers, its differences, its pairs. */
(() => {
  const { data, byId, make, format, signed, pValue, decimals, withUnit, swatch, mix, css, gradient, DIVERGING } = page;
  if (!data.maps.length) return;

  const select = byId("map-metric"), grids = byId("map-grids"), detail = byId("map-detail");
  const opened = new Map(); // series -> its unpacked pairs
  let chosen = { row: 0, head: 0 };
  let turn = 0;
  data.maps.forEach((map, index) => select.append(make("option", { value: index }, map.label)));

  const mean = data.heads.length; // the column behind the heads
  const headName = (column) => (column === mean ? "mean over heads" : "head " + data.heads[column]);
  /** A column as the viewer's choice of head; its maps hold all of a layer's heads. */
  const viewerHead = (column) => (column === mean ? "mean" : data.heads[column]);
  const current = () => data.maps[Number(select.value)];
  const pairName = (grid) => data.conditions[grid.condition] + " − " + data.conditions[grid.against];

  const survives = (cell) => cell.verdict === "different" || cell.verdict === "negligible";

  function describe(cell) {
    if (!cell || cell.d === null) return "undefined";
    const verdict = cell.bound === undefined ? "" : ", " + cell.verdict + " (bound ±" + format(cell.bound) + ")";
    return signed(cell.d) + (survives(cell) ? ", survives max-T" : ", does not survive max-T") + verdict;
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
    const table = make("table", { className: "heat", role: "grid", "aria-label": map.label + ", " + pairName(grid) + ": layers by heads" });
    const header = make("tr", { role: "row" }, make("th", { scope: "col", title: "layer by head" }, ""));
    for (const head of data.heads) header.append(make("th", { scope: "col", "aria-label": "head " + head }, String(head)));
    header.append(make("th", { className: "gap", role: "presentation" }));
    header.append(make("th", { scope: "col", "aria-label": "mean over heads", title: "mean over heads" }, "mean"));
    table.append(make("thead", {}, header));
    const body = make("tbody");
    grid.cells.forEach((cells, row) => {
      const line = make("tr", { role: "row" });
      line.append(make("th", { scope: "row", "aria-label": "layer " + data.layers[row], title: data.sites[row] }, String(data.layers[row])));
      cells.forEach((cell, head) => {
        const known = cell && cell.d !== null;
        if (head === mean) line.append(make("th", { className: "gap", role: "presentation" }));
        const square = make("td", {
          role: "gridcell", tabIndex: -1,
          "aria-label": "layer " + data.layers[row] + ", " + headName(head) + ": " + describe(cell),
        }, known ? data.marks[cell.verdict] : "");
        if (known) {
          const full = mix(DIVERGING, 0.5 + 0.5 * cell.d / limit);
          // What does not survive is faded, or noise on a narrow scale would look like a finding.
          const rgb = survives(cell) ? full : full.map((value) => Math.round(247 + 0.4 * (value - 247)));
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
    table.addEventListener("click", pick);
    table.addEventListener("focusin", pick);
    table.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      const row = Math.min(Math.max(chosen.row + step[0], 0), data.layers.length - 1);
      const head = Math.min(Math.max(chosen.head + step[1], 0), mean);
      choose(row, head);
      table.querySelector('td[data-row="' + row + '"][data-head="' + head + '"]').focus();
    });
    return make("figure", {}, make("figcaption", {}, swatch(grid.condition), pairName(grid)), table);
  }

  /** Shows a cell in every comparison at once. */
  function choose(row, head) {
    chosen = { row, head };
    for (const cell of grids.querySelectorAll("td")) {
      const on = Number(cell.dataset.row) === row && Number(cell.dataset.head) === head;
      cell.classList.toggle("on", on);
      cell.tabIndex = on ? 0 : -1;
    }
    const map = current();
    const parts = [make("h3", {}, "Layer " + data.layers[row] + ", " + headName(head)), make("p", { className: "scope" }, map.label + " · " + data.sites[row])];
    const shown = page.viewer ? page.viewer.layer(data.layers[row]) : -1;
    if (shown >= 0) {
      const go = make("button", { type: "button" }, "Show its attention");
      go.addEventListener("click", () => page.viewer.show({ layer: shown, head: viewerHead(head) }));
      parts.push(make("p", {}, go));
    }
    const blocks = map.grids.map((grid) => {
      const cell = grid.cells[row][head];
      const pairs = make("div", { className: "pairplot" });
      return { grid, cell, pairs, element: make("div", {}, ...cellDetail(map, grid, cell), cell && cell.d !== null ? pairs : null) };
    });
    parts.push(make("div", { className: "pairs" }, ...blocks.map((block) => block.element)));
    detail.replaceChildren(...parts);
    drawPairs(map, row, head, blocks);
  }

  const level = (share) => Number((100 * share).toPrecision(6)) + " %";
  const both = (one, other, difference, between) =>
    format(one, 3, decimals(difference)) + between + format(other, 3, decimals(difference));

  function cellDetail(map, grid, cell) {
    const title = make("h4", {}, swatch(grid.condition), data.conditions[grid.condition] + " against " + data.conditions[grid.against]);
    if (!cell || cell.d === null) return [title, make("p", {}, "No value: undefined, or there is no such head in this layer.")];
    const rows = [["difference", withUnit(signed(cell.d), map.unit)]];
    for (const [name, [low, high]] of [["CI", cell.ci], ["simultaneous CI", cell.all]])
      if (low !== null && high !== null) rows.push([level(data.confidence) + " " + name, both(low, high, high - low, " to ")]);
    if (cell.a !== null && cell.b !== null) rows.push(["means", both(cell.a, cell.b, cell.d, " → ")]);
    rows.push(["dz", cell.dz === null ? "undefined" : format(cell.dz)]);
    rows.push(["p, max-T", pValue(cell.p) + (survives(cell) ? " (survives)" : " (does not survive)")]);
    if (cell.bound !== undefined) rows.push(["bound ±" + format(cell.bound), cell.verdict]);
    if (cell.mde !== null) rows.push(["detectable", "from " + format(cell.mde) + " (power " + level(data.power) + ")"]);
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

  // ---- Pairs of values: one point an image, condition against baseline ------------------------------------------------

  async function unpack(map) {
    if (!opened.has(map)) opened.set(map, page.inflate(map.pairs).then((content) => {
      const cells = data.layers.length * (mean + 1);
      const edges = new Float32Array(content, 0, 2 * cells);
      return { low: edges.subarray(0, cells), high: edges.subarray(cells), steps: new Uint8Array(content, 8 * cells) };
    }));
    return opened.get(map);
  }

  /** Values of one condition in one cell, an image each; NaN where there is none. */
  function values(pairs, row, head, condition) {
    const cell = row * (mean + 1) + head, n = data.images.length;
    const start = (cell * data.conditions.length + condition) * n;
    const spread = pairs.high[cell] - pairs.low[cell];
    return Array.from(pairs.steps.subarray(start, start + n), (step) => (step === 255 ? NaN : pairs.low[cell] + spread * step / 254));
  }

  async function drawPairs(map, row, head, blocks) {
    const mine = ++turn;
    let pairs;
    try {
      pairs = await unpack(map);
    } catch (error) {
      for (const block of blocks) block.pairs.textContent = "This browser cannot unpack the pairs; any browser from 2023 on can.";
      return;
    }
    if (mine !== turn) return; // another cell has been chosen since
    const cell = row * (mean + 1) + head, low = pairs.low[cell], high = pairs.high[cell];
    for (const block of blocks) {
      const { grid } = block;
      const across = values(pairs, row, head, grid.against), up = values(pairs, row, head, grid.condition);
      const place = (value) => (high > low ? 100 * (value - low) / (high - low) : 50);
      const plot = make("div", { className: "plot c" + (grid.condition % 6), role: "group" });
      let above = 0, below = 0;
      across.forEach((from, image) => {
        const to = up[image];
        if (Number.isNaN(from) || Number.isNaN(to)) return;
        if (to > from) above++; else if (to < from) below++;
        const title = data.images[image] + ": " + format(from) + " → " + format(to);
        const sample = page.viewer ? page.viewer.image(data.images[image]) : -1;
        const dot = sample < 0 ? make("i", { title }) : make("button", {
          type: "button", className: "sample", title, "aria-label": "Show the attention of " + title,
        });
        if (sample >= 0) dot.addEventListener("click", () => page.viewer.show({
          image: sample, layer: page.viewer.layer(data.layers[row]), head: viewerHead(head),
        }));
        dot.style.left = place(from) + "%";
        dot.style.bottom = place(to) + "%";
        plot.append(dot);
      });
      const of = data.images.length < data.allImages ? data.images.length + " of " + data.allImages + " images" : data.allImages + " images";
      plot.setAttribute("aria-label", "Pairs of " + of + ": " + above + " higher in " + data.conditions[grid.condition] + ", " + below + " lower");
      block.pairs.replaceChildren(
        make("p", { className: "axis up" }, "↑ " + data.conditions[grid.condition]),
        plot,
        make("div", { className: "ends" }, make("span", {}, format(low)), make("span", {}, data.conditions[grid.against] + " →"), make("span", {}, format(high))),
        make("p", { className: "scope" }, of + ": " + above + " above the diagonal (higher), " + below + " below."
          + (plot.querySelector(".sample") ? " Ringed: images whose attention is kept; press one to see it." : "")),
      );
    }
  }

  // ---- From the overview, and where to open ---------------------------------------------------------------------------

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-show]");
    if (!button) return;
    const index = data.maps.findIndex((map) => map.metric === button.dataset.metric && (map.region ?? "") === button.dataset.region);
    select.value = index;
    chosen = { row: data.layers.indexOf(Number(button.dataset.layer)), head: mean };
    drawMaps();
    if (button.dataset.show === "attention" && page.viewer) {
      page.viewer.show({ layer: page.viewer.layer(data.layers[chosen.row]), head: "mean" });
      return;
    }
    byId("maps").scrollIntoView();
    grids.querySelector("td.on").focus({ preventScroll: true });
  });

  select.addEventListener("change", drawMaps);
  grids.style.setProperty("--cell", mean <= 6 ? "2.6rem" : "clamp(1rem, calc((100vw - 4.5rem) / " + (mean + 3.2) + "), 1.6rem)");
  const opening = data.maps.find((map) => map.open) ?? data.maps[0];
  select.value = data.maps.indexOf(opening);
  const [firstRow, firstHead] = opening.open ?? [0, 0];
  chosen = { row: firstRow, head: firstHead };
  const openingLayer = page.viewer ? page.viewer.layer(data.layers[chosen.row]) : -1;
  if (openingLayer >= 0) page.viewer.open({ layer: openingLayer, head: "mean" });
  drawMaps();
})();
