// What NiceGUI does not offer: light or dark, images dropped or pasted anywhere, keys of the review page.
window.normweave = (() => {
  const STORAGE_KEY = "normweave-theme";
  const THEMES = { system: null, light: false, dark: true };
  const theme = () => (localStorage.getItem(STORAGE_KEY) in THEMES ? localStorage.getItem(STORAGE_KEY) : "system");

  function showTheme() {
    setDark(THEMES[theme()]);
    document.querySelectorAll(".theme-name").forEach((name) => (name.textContent = theme()));
  }

  function nextTheme() {
    const names = Object.keys(THEMES);
    localStorage.setItem(STORAGE_KEY, names[(names.indexOf(theme()) + 1) % names.length]);
    showTheme();
  }

  // Upload a few images at a time and wait while the server is busy, so that neither side holds many in memory.
  const AT_ONCE = 2;
  const RETRY_MS = 60_000;
  const waiting = [];
  let sending = 0;
  let sent = 0;
  let total = 0;

  function take(files) {
    if (!document.querySelector(".drop") || !files.length) return false;
    waiting.push(...files);
    total += files.length;
    while (sending < AT_ONCE && waiting.length) work();
    return true;
  }

  async function work() {
    sending += 1;
    while (waiting.length) {
      showProgress();
      const file = waiting.shift();
      try {
        emitEvent("inspected", await inspected(file));
      } catch (error) {
        emitEvent("not_inspected", `${file.name}: ${error.message}`);
      }
      sent += 1;
    }
    sending -= 1;
    if (!sending) sent = total = 0;
    showProgress();
  }

  async function inspected(file) {
    const most = Number(document.querySelector(".drop input").dataset.most);
    if (file.size > most) throw new Error(`only images of up to ${Math.floor(most / 2 ** 20)} MiB are accepted.`);
    const until = Date.now() + RETRY_MS;
    for (;;) {
      const answer = await fetch(`/upload?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file }).catch(
        () => ({ status: 0, json: () => ({ detail: "the server cannot be reached." }) }),
      );
      const result = await answer.json();
      if (answer.status === 200) return result.id;
      if (![0, 429, 503].includes(answer.status) || Date.now() > until) throw new Error(result.detail);
      await new Promise((resolve) => setTimeout(resolve, 500));
    }
  }

  function showProgress() {
    const progress = document.querySelector(".progress");
    if (progress) progress.textContent = sending ? `${sent} of ${total} inspected …` : "";
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
    event.preventDefault(); // otherwise the browser leaves the page and shows the file
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
    event.target.value = ""; // otherwise the same image cannot be chosen twice
  });
  document.addEventListener("paste", (event) => {
    if (take([...(event.clipboardData?.files || [])].map(named))) event.preventDefault();
  });

  // A sound for images that are not good, if this browser wants it. Browsers allow it after the first touch or key.
  const SOUND_KEY = "normweave-sound";
  const TONES = [
    [880, 0],
    [660, 0.25],
    [880, 0.5],
  ]; // Hz, s
  let audio;

  function alarm() {
    if (localStorage.getItem(SOUND_KEY) !== "on") return;
    audio ??= new AudioContext();
    audio.resume();
    for (const [pitch, after] of TONES) {
      const tone = new OscillatorNode(audio, { type: "square", frequency: pitch });
      tone.connect(new GainNode(audio, { gain: 0.2 })).connect(audio.destination);
      tone.start(audio.currentTime + after);
      tone.stop(audio.currentTime + after + 0.2);
    }
  }

  document.addEventListener("change", (event) => {
    if (!event.target.matches(".sound")) return;
    localStorage.setItem(SOUND_KEY, event.target.checked ? "on" : "off");
    alarm(); // so that a person hears it
  });

  // A decision is for the inspection whose picture the browser has shown for a moment, and carries its id: a second tap
  // before a person can have seen the next picture decides nothing.
  const LOOK_MS = 300;
  const KEYS = { a: "accept", r: "reject", n: "next", u: "undo" };
  let shown = 0;
  let looking;

  function show(id) {
    clearTimeout(looking);
    mark(0);
    if (id) looking = setTimeout(mark, LOOK_MS, id);
  }

  function mark(id) {
    shown = id;
    document
      .querySelectorAll(".decision.accept, .decision.reject")
      .forEach((button) => button.setAttribute("aria-disabled", String(!id)));
  }

  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.target.closest("input, textarea, select, [contenteditable], [role=dialog], [role=listbox]")) return;
    const button = document.querySelector(`[data-decision="${KEYS[event.key.toLowerCase()]}"]`);
    if (!button || button.disabled || button.ariaDisabled === "true") return;
    event.preventDefault();
    button.click();
  });

  // Quasar makes the list inside a menu focusable, which no child of a list box may be but its options.
  new MutationObserver(() =>
    document.querySelectorAll(".q-virtual-scroll__content[tabindex]").forEach((list) => list.removeAttribute("tabindex")),
  ).observe(document.documentElement, { childList: true, subtree: true });

  document.addEventListener("DOMContentLoaded", () => {
    showTheme(); // NiceGUI has built the page by then
    const sound = document.querySelector(".sound");
    if (sound) sound.checked = localStorage.getItem(SOUND_KEY) === "on";
  });

  // The server closes and refuses the socket of a login that has ended: show the form.
  async function leaveIfLoggedOut() {
    const answer = await fetch("/v1/model").catch(() => null); // null: the server cannot be reached
    if (answer?.status === 401) location.assign("/");
  }

  function watchLogin() {
    if (!window.socket) return setTimeout(watchLogin, 200);
    window.socket.on("disconnect", leaveIfLoggedOut);
    window.socket.on("connect_error", leaveIfLoggedOut);
  }

  document.addEventListener("DOMContentLoaded", watchLogin);
  return { alarm, nextTheme, show, shown: () => shown };
})();
