"use strict";
/** What the page's parts share: the data, elements, numbers as text, colours. */
const page = (() => {
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

  // Decimals that two numbers need so that their difference is seen, as in text.py.
  const decimals = (difference) => (difference ? Math.max(0, 1 - Math.floor(Math.log10(Math.abs(difference)))) : 0);
  function format(value, digits = 3, shown = 0) {
    if (value === null || value === undefined) return "undefined";
    if (value === 0) return "0";
    const size = Math.abs(value);
    digits = Math.max(digits, Math.min(shown + Math.floor(Math.log10(size)) + 1, 9));
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
  const pValue = (p) => (p === null ? "undefined" : p < 1e-4 ? "<\u00a00.0001" : p >= 0.9995 ? "1" : String(Number(p.toPrecision(2))));
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
  const DIVERGING = data.diverging;
  const SEQUENTIAL = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

  /** What deflated base64 unpacks to; a browser without DecompressionStream (before 2023) rejects. */
  async function inflate(text) {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).arrayBuffer();
  }

  return {
    data, byId, make, format, decimals, signed, pValue, percent, withUnit, swatch, mix, css, gradient, inflate,
    DIVERGING, SEQUENTIAL,
    viewer: null, // set by the viewer, where there is one
  };
})();
