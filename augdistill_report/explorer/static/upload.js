// Images from this machine, chosen or dropped anywhere on the explorer. A file that is too large is named, not sent.

export default {
  render({ model, el }) {
    const label = document.createElement("label");
    label.className = "augdistill-drop";
    label.textContent = "Choose one to twenty images, or drop them on this page. ";
    const input = document.createElement("input");
    Object.assign(input, { type: "file", multiple: true, accept: "image/*" });
    input.setAttribute("aria-label", "your images");
    label.append(input);
    el.append(label);

    const send = async (files) => {
      const few = [...files].slice(0, model.get("most_images"));
      for (const [k, file] of few.entries()) {
        const large = file.size > model.get("most_bytes");
        const content = { name: file.name, size: file.size, last: k === few.length - 1, left_out: files.length - few.length };
        model.send(content, undefined, large ? [] : [await file.arrayBuffer()]);
      }
    };
    const page = (event) => event.dataTransfer?.types.includes("Files") && event.target.closest?.(".augdistill-explorer");
    const over = (event) => page(event) && event.preventDefault();
    const drop = (event) => {
      if (!page(event)) return;
      event.preventDefault();
      send(event.dataTransfer.files);
    };
    input.onchange = () => send(input.files).then(() => (input.value = ""));
    document.addEventListener("dragover", over);
    document.addEventListener("drop", drop);
    return () => {
      document.removeEventListener("dragover", over);
      document.removeEventListener("drop", drop);
    };
  },
};
