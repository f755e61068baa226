// The section about `paring debug`: filters, details of a layer, histograms, the colours of the graph.

const SVG = "http://www.w3.org/2000/svg";

function draw(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const short = (value) => String(Number(value.toPrecision(4))).replace("-", "−");

// -- filters ----------------------------------------------------------------------------------------------------

function filter(form) {
  const { text, kind, form: became, count } = form.elements;
  const table = document.getElementById(form.dataset.table);
  const wanted = text.value.trim().toLowerCase();
  let shown = 0;
  for (const group of table.tBodies) {
    const layer = data.layers[group.id.split("-")[1]];
    const name = layer.facts[0][1].toLowerCase();
    group.hidden = !(
      name.includes(wanted) &&
      (!kind.value || kind.value === layer.native) &&
      (!became.value || became.value === layer.form)
    );
    shown += !group.hidden;
  }
  const all = table.tBodies.length;
  count.value = shown === all ? `${all} layers` : `${shown} of ${all} layers`;
  find(".none").hidden = shown > 0;
}

for (const form of findAll("form.filters")) {
  for (const event of ["input", "change"]) form.addEventListener(event, () => filter(form));
  form.addEventListener("submit", (event) => event.preventDefault());
  // The fields are empty only after the event.
  form.addEventListener("reset", () => setTimeout(() => filter(form)));
}

// -- details ----------------------------------------------------------------------------------------------------

function errorTable(layer) {
  const measures = ["SNR, dB", "Median channel, dB", "MSE/scale²", "Cosine", "Clipped"];
  const columns = ["Own", "In model"].map((title, index) => [title, layer.errors[index]]).filter(([, error]) => error);
  if (!columns.length) return make("p", {}, "Its error was not measured.");
  const head = columns.map(([title]) => make("th", { scope: "col", class: "n" }, title));
  const rows = measures.map((measure, index) => {
    const cells = columns.map(([, error]) => make("td", { class: "n" }, error[index]));
    return make("tr", {}, make("th", { scope: "row" }, measure), ...cells);
  });
  return make(
    "table",
    {},
    make("caption", {}, "Error: alone with float input, and inside the optimized model"),
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "Measure"), ...head)),
    make("tbody", {}, ...rows),
  );
}

function facts(layer) {
  const list = make("dl", { class: "facts" });
  for (const [term, text] of layer.facts) list.append(make("dt", {}, term), make("dd", { class: "name" }, text));
  if (layer.inputs.length) {
    const links = layer.inputs.flatMap((index) => [
      ", ",
      make("a", { href: `#layer-${index}` }, data.layers[index].name),
    ]);
    list.append(make("dt", {}, "Reads from"), make("dd", {}, ...links.slice(1)));
  }
  if (layer.rule !== null) {
    const link = make("a", { href: `#rule-${layer.rule + 1}` }, `Rule ${layer.rule + 1}`);
    list.append(make("dt", {}, "Decided by"), make("dd", {}, link));
  }
  return list;
}

// -- histograms -------------------------------------------------------------------------------------------------

const WIDE = 480, HIGH = 132, LEFT = 8, RIGHT = 472, TOP = 8, FLOOR = 104;

// Bars stand for the logarithm of counts: a tail of a few values is what a range is chosen for.
function histogram(title, { low, high, counts, scale, range }) {
  const from = Math.min(low, range ? range[0] : low);
  const to = Math.max(high, range ? range[1] : high);
  const span = to - from || 1;
  const x = (value) => LEFT + ((value - from) / span) * (RIGHT - LEFT);
  const most = Math.log1p(Math.max(...counts));
  const step = (high - low) / counts.length || span;
  const paths = { bars: "", lost: "" };
  counts.forEach((count, index) => {
    if (!count) return;
    const start = low + index * step;
    const middle = start + step / 2;
    const kind = range && (middle < range[0] || middle > range[1]) ? "lost" : "bars";
    const width = Math.max(x(start + step) - x(start), 0.75);
    const height = Math.max((Math.log1p(count) / most) * (FLOOR - TOP), 1);
    paths[kind] += `M${x(start).toFixed(1)} ${FLOOR}v${-height.toFixed(1)}h${width.toFixed(1)}V${FLOOR}Z`;
  });
  let said = `${title}: values from ${short(low)} to ${short(high)}`;
  if (range) said += `; the grid holds ${short(range[0])} to ${short(range[1])}`;
  if (scale) said += ` in steps of ${short(scale)}`;
  const picture = draw("svg", { class: "histogram", viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", "aria-label": said });
  if (range) {
    const [start, end] = range.map(x);
    picture.append(draw("rect", { class: "hold", x: start, y: TOP, width: Math.max(end - start, 1), height: FLOOR - TOP }));
  }
  for (const [kind, path] of Object.entries(paths)) if (path) picture.append(draw("path", { class: kind, d: path }));
  picture.append(draw("path", { class: "axis", d: `M${LEFT} ${FLOOR}H${RIGHT}` }));
  if (range) {
    for (const end of range.map(x)) picture.append(draw("path", { class: "end", d: `M${end} ${TOP - 4}V${FLOOR + 4}` }));
    const levels = scale ? Math.round((range[1] - range[0]) / scale) : 0;
    if (levels > 0 && levels <= 32) {
      const at = Array.from({ length: levels + 1 }, (_, index) => x(range[0] + index * scale).toFixed(1));
      picture.append(draw("path", { class: "end", d: at.map((place) => `M${place} ${FLOOR}v4`).join("") }));
    }
  }
  for (const [value, anchor] of [[from, "start"], [to, "end"]]) {
    picture.append(draw("text", { x: x(value), y: FLOOR + 18, "text-anchor": anchor }, short(value)));
  }
  if (from < 0 && to > 0 && x(0) > 90 && x(0) < WIDE - 90) {
    picture.append(draw("text", { x: x(0), y: FLOOR + 18, "text-anchor": "middle" }, "0"));
  }
  return make("figure", {}, make("figcaption", {}, `${said}. Counts are logarithmic.`), picture);
}

fillers.push((group) => {
  const [section, index] = group.id.split("-");
  if (section !== "layer") return null;
  const layer = data.layers[index];
  const pictures = make("div", { class: "panes" });
  if (layer.activation) pictures.append(histogram("Result", layer.activation));
  if (layer.weights) pictures.append(histogram("Weights", layer.weights));
  return make("div", { class: "fold" }, make("div", { class: "panes" }, make("div", {}, errorTable(layer)), facts(layer)), pictures);
});

// -- the graph --------------------------------------------------------------------------------------------------

find("#measure")?.addEventListener("change", ({ target }) => {
  const nodes = findAll(".lanes circle");
  const marks = findAll(".lanes .mark");
  data.layers.forEach((layer, index) => {
    const [text, band] = layer.marks[target.value];
    nodes[index].setAttribute("class", `node b${band ?? "None"}`);
    nodes[index].setAttribute("r", band === null ? 3 : data.radii[band]);
    marks[index].textContent = text;
  });
  say(`Coloured by ${target.selectedOptions[0].textContent}`);
});
