// What NiceGUI's elements do not serve: light or dark, images dropped or pasted anywhere, keys of the review.
window.normweave = (() => {
  const KEPT = "normweave-theme";
  const THEMES = { system: null, light: false, dark: true };
  const theme = () => (localStorage.getItem(KEPT) in THEMES ? localStorage.getItem(KEPT) : "system");

  function showTheme() {
    setDark(THEMES[theme()]);
    document.querySelectorAll(".theme-name").forEach((name) => (name.textContent = theme()));
  }

  function nextTheme() {
    const names = Object.keys(THEMES);
    localStorage.setItem(KEPT, names[(names.indexOf(theme()) + 1) % names.length]);
    showTheme();
  }

  // images for the uploader of this page, if it has one
  function take(files) {
    const zone = document.querySelector("[data-uploader]");
    if (!zone || !files.length) return false;
    runMethod(Number(zone.dataset.uploader), "addFiles", [files]);
    return true;
  }

  function named(file) {
    if (file.name && file.name !== "image.png") return file;
    const now = new Date().toISOString().slice(0, 19).replace(/[-:]/g, "").replace("T", "-");
    return new File([file], `pasted-${now}.png`, { type: file.type });
  }

  const carriesFiles = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
  const over = (on) => document.querySelector("[data-uploader]")?.classList.toggle("over", on);

  document.addEventListener("dragover", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault(); // else the browser would leave the page and show the file
    over(true);
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget || over(false));
  document.addEventListener("drop", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    over(false);
    take([...event.dataTransfer.files]);
  });
  document.addEventListener("paste", (event) => {
    if (take([...(event.clipboardData?.files || [])].map(named))) event.preventDefault();
  });

  // The inspection that the person sees goes with what they say of it: a second press during the way to the next
  // one means the first one still, and the server knows it.
  const seen = () => Number(document.querySelector("[data-seen]")?.dataset.seen || 0);
  const KEYS = { a: "accept", r: "reject", n: "next", u: "undo" };

  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.target.closest("input, textarea, select, [contenteditable], [role=dialog], [role=listbox]")) return;
    const button = document.querySelector(`[data-decision="${KEYS[event.key.toLowerCase()]}"]`);
    if (!button || button.disabled) return;
    event.preventDefault();
    button.click();
  });

  document.addEventListener("DOMContentLoaded", showTheme); // NiceGUI has built the page by then
  return { nextTheme, seen };
})();
