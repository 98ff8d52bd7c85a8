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

  // Images go to the server a few at a time, and wait here while it is busy: so neither side holds many.
  const AT_ONCE = 2;
  const PATIENCE = 60_000;
  const waiting = [];
  let sending = 0;
  let sent = 0;

  function take(files) {
    if (!document.querySelector(".drop") || !files.length) return false;
    waiting.push(...files);
    while (sending < AT_ONCE && waiting.length) work();
    return true;
  }

  async function work() {
    sending += 1;
    while (waiting.length) {
      tellProgress();
      const file = waiting.shift();
      try {
        emitEvent("inspected", await inspected(file));
      } catch (error) {
        emitEvent("not_inspected", `${file.name}: ${error.message}`);
      }
      sent += 1;
    }
    sending -= 1;
    if (!sending) sent = 0;
    tellProgress();
  }

  async function inspected(file) {
    const most = Number(document.querySelector(".drop input").dataset.most);
    if (file.size > most) throw new Error(`only images of up to ${Math.floor(most / 2 ** 20)} MiB are taken.`);
    const until = Date.now() + PATIENCE;
    for (;;) {
      const answer = await fetch(`/upload?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file }).catch(
        () => ({ status: 0, json: () => ({ error: "the server cannot be reached." }) }),
      );
      const said = await answer.json();
      if (answer.status === 200) return said.id;
      if (![0, 429, 503].includes(answer.status) || Date.now() > until) throw new Error(said.error);
      await new Promise((resolve) => setTimeout(resolve, 500));
    }
  }

  function tellProgress() {
    const place = document.querySelector(".progress");
    if (place) place.textContent = sending ? `${sent} of ${sent + waiting.length + sending} inspected …` : "";
  }

  function named(file) {
    if (file.name && file.name !== "image.png") return file;
    const now = new Date().toISOString().slice(0, 19).replace(/[-:]/g, "").replace("T", "-");
    return new File([file], `pasted-${now}.png`, { type: file.type });
  }

  const carriesFiles = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
  const over = (on) => document.querySelector(".drop")?.classList.toggle("over", on);

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
  document.addEventListener("change", (event) => {
    if (!event.target.matches(".drop input")) return;
    take([...event.target.files]);
    event.target.value = ""; // or the same image could not be chosen twice
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
