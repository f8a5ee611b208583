// The browser's part of the explorer: names for controls that ipywidgets leaves without, the address, copies, downloads.

function name(root) {
  for (const part of root.querySelectorAll("input, select, button"))
    part.dataset.lmSuppressShortcuts = "true"; // in JupyterLab, arrow keys on them would move among cells
  for (const box of root.querySelectorAll(".widget-inline-hbox")) {
    const label = box.querySelector("label")?.innerText.trim();
    if (!label) continue;
    for (const part of box.querySelectorAll(".noUi-handle, .widget-readout")) part.setAttribute("aria-label", label);
  }
  const buttons = [...root.querySelectorAll(".widget-toggle-button")];
  const pressed = buttons.map((button) => button.classList.contains("mod-active"));
  buttons.forEach((button, k) => button.setAttribute("aria-pressed", pressed[k]));
  root.querySelectorAll(".augdistill-section").forEach((section, k) => section.classList.toggle("chosen", pressed[k]));
  for (const image of root.querySelectorAll("img[class*=alt-]"))
    image.alt = image.className.match(/alt-(\S+)/)[1].replaceAll("-", " ");
  for (const bar of root.querySelectorAll(".progress")) {
    bar.setAttribute("role", "progressbar");
    bar.setAttribute("aria-label", "progress");
  }
  for (const line of root.querySelectorAll(".augdistill-line")) line.setAttribute("aria-live", "polite");
}

async function copy(model, text) {
  try {
    await navigator.clipboard.writeText(text);
    model.set("copied", { text, done: true });
  } catch {
    model.set("copied", { text, done: false }); // no clipboard here: the page shows the text
  }
  model.save_changes();
}

function download({ name, type }, bytes) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([bytes], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

export default {
  render({ model, el }) {
    let asked = 0;
    const named = () => {
      cancelAnimationFrame(asked);
      asked = requestAnimationFrame(() => document.querySelectorAll(".augdistill-explorer").forEach(name));
    };
    const watch = new MutationObserver(named);
    watch.observe(document.body, { childList: true, subtree: true, attributeFilter: ["class"] });
    named();
    const hear = (message, buffers) => {
      if (message.do === "link") {
        const address = new URL(location.pathname, location.origin);
        address.searchParams.set("explorer", message.state);
        copy(model, address.href);
      }
      if (message.do === "copy") copy(model, message.text);
      if (message.do === "download") download(message, buffers[0]);
    };
    model.on("msg:custom", hear);
    model.set("query", location.search);
    model.save_changes();
    return () => {
      watch.disconnect();
      model.off("msg:custom", hear);
    };
  },
};
