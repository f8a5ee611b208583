// A native slider and a number for each range of a phi, with marks where it was learned and where its experts' is; and a
// switch for each link of a chain. A slider's position is the square root of its value, for small ranges.

const STEPS = 200;
const place = (value, most) => Math.round(STEPS * Math.sqrt(Math.min(value / most, 1)));
const text = (value) => (value >= 100 ? value.toFixed(0) : value.toPrecision(2).replace(/e.*/, ""));

function add(parent, tag, properties = {}, label = "") {
  const made = Object.assign(document.createElement(tag), properties);
  if (label) made.setAttribute("aria-label", label);
  parent.append(made);
  return made;
}

function mark(track, kind, row, value, what) {
  const share = place(value, row.most) / STEPS;
  const made = add(track, "span", { className: `augdistill-mark ${kind}`, title: `${what}: ${text(value)} ${row.unit}` });
  made.style.left = `calc(8px + (100% - 16px) * ${share})`;
}

function dial(el, row, change) {
  const line = add(el, "div", { className: "augdistill-dial" });
  add(line, "span", {}).textContent = row.name;
  const track = add(line, "div", { className: "augdistill-track" });
  const slider = add(track, "input", { type: "range", min: 0, max: STEPS, step: 1 }, row.name);
  mark(track, "learned", row, row.learned, "learned");
  if (row.taught !== null) mark(track, "taught", row, row.taught, "the experts'");
  const number = add(line, "input", { type: "number", min: 0, max: row.most, step: "any" }, `${row.name}, ${row.unit}`);
  add(line, "span", { className: "augdistill-unit" }).textContent = row.unit;
  const show = (value) => {
    slider.value = place(value, row.most);
    slider.setAttribute("aria-valuetext", `${text(value)} ${row.unit}`);
    number.value = text(value);
  };
  slider.oninput = () => (number.value = text(row.most * (slider.value / STEPS) ** 2));
  slider.onchange = () => change(row.name, row.most * (slider.value / STEPS) ** 2);
  number.onchange = () => change(row.name, Number(number.value));
  return show;
}

export default {
  render({ model, el }) {
    let shows = {};
    const change = (name, value) => {
      model.set("values", { ...model.get("values"), [name]: value });
      model.save_changes();
    };
    const values = () => {
      for (const row of model.get("rows")) shows[row.name]?.(model.get("values")[row.name] ?? row.learned);
    };
    const draw = () => {
      el.replaceChildren();
      shows = {};
      const links = model.get("links");
      links.forEach((link, k) => {
        if (links.length > 1) {
          const label = add(el, "label", { className: "augdistill-link" });
          const box = add(label, "input", { type: "checkbox", checked: !model.get("off").includes(k) });
          label.append(` ${k + 1} ${link}`);
          box.onchange = () => {
            const off = model.get("off").filter((other) => other !== k);
            model.set("off", box.checked ? off : [...off, k]);
            model.save_changes();
          };
        }
        for (const row of model.get("rows").filter((row) => row.link === k)) shows[row.name] = dial(el, row, change);
      });
      values();
    };
    model.on("change:rows change:links change:off", draw);
    model.on("change:values", values);
    draw();
  },
};
