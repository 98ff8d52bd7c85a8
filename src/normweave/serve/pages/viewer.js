// One image with its anomaly map over it. Wheel, pinch, drag, double click, keys and buttons zoom and move; the slider
// sets the opacity of the map. Opacity and boxes are stored in this browser.
const STORAGE_KEY = "normweave-viewer";
const MOST = 12;

function stored() {
  try {
    return JSON.parse(localStorage.getItem(STORAGE_KEY)) || {};
  } catch {
    return {};
  }
}

export default {
  props: { inspection: Number, image: String, heat: String, boxes: Array, height: Number, width: Number, label: String, missing: String },
  template: `
    <figure class="viewer">
      <div v-if="!image" class="viewer-empty">{{ missing }}</div>
      <div v-else ref="stage" class="viewer-stage" tabindex="0" role="img" :aria-label="label" :class="{ zoomed: scale > 1 }"
           :style="{ aspectRatio: width + ' / ' + height, '--ratio': width / height }"
           @wheel="wheel" @pointerdown="down" @pointermove="move" @pointerup="up" @pointercancel="up"
           @dblclick="double" @keydown="key">
        <div class="viewer-plane" :style="{ transform: 'translate(' + x + 'px,' + y + 'px) scale(' + scale + ')' }">
          <img :src="image" alt="" draggable="false" @error="failed = true" @load="loaded">
          <img class="viewer-heat" :src="heat" alt="" draggable="false" :style="{ opacity: opacity / 100 }">
          <svg v-if="framed" :viewBox="'0 0 ' + width + ' ' + height" preserveAspectRatio="none" aria-hidden="true">
            <g v-for="box in boxes">
              <rect class="under" :x="box[0]" :y="box[1]" :width="box[2]" :height="box[3]"/>
              <rect :x="box[0]" :y="box[1]" :width="box[2]" :height="box[3]"/>
            </g>
          </svg>
        </div>
        <div v-if="failed" class="viewer-failed">The image could not be loaded.</div>
      </div>
      <figcaption v-show="image" class="viewer-controls">
        <label class="viewer-slider">Map
          <input type="range" min="0" max="100" step="1" v-model.number="opacity" @change="keep" aria-label="Opacity of the map">
          <output>{{ opacity }} %</output>
        </label>
        <label class="viewer-check"><input type="checkbox" v-model="framed" @change="keep"> Boxes ({{ boxes.length }})</label>
        <span class="viewer-zoom">
          <button type="button" @click="zoomMiddle(1 / 1.5)" aria-label="Zoom out" title="Zoom out">−</button>
          <button type="button" @click="fit" aria-label="Whole image" title="Whole image">{{ Math.round(scale * 100) }} %</button>
          <button type="button" @click="zoomMiddle(1.5)" aria-label="Zoom in" title="Zoom in">+</button>
        </span>
      </figcaption>
    </figure>`,
  data() {
    const chosen = stored();
    return {
      opacity: Number.isFinite(chosen.opacity) ? chosen.opacity : 60,
      framed: chosen.framed !== false,
      scale: 1,
      x: 0,
      y: 0,
      failed: false,
    };
  },
  created() {
    this.fingers = new Map(); // not reactive: changes many times a second
  },
  watch: {
    inspection() {
      this.fingers.clear();
      this.failed = false;
      this.fit();
      this.begin();
    },
  },
  mounted() {
    this.begin();
  },
  unmounted() {
    window.normweave.show(0);
  },
  methods: {
    begin() {
      // Without an image the reason is shown instead; with one, `loaded` follows.
      window.normweave.show(this.image ? 0 : this.inspection);
    },
    loaded(event) {
      this.failed = false;
      if (event.target.getAttribute("src") === this.image) window.normweave.show(this.inspection);
    },
    keep() {
      localStorage.setItem(STORAGE_KEY, JSON.stringify({ opacity: this.opacity, framed: this.framed }));
    },
    fit() {
      this.scale = 1;
      this.x = this.y = 0;
    },
    zoom(factor, left, top) {
      const scale = Math.min(MOST, Math.max(1, this.scale * factor));
      this.moveTo(left - ((left - this.x) * scale) / this.scale, top - ((top - this.y) * scale) / this.scale, scale);
    },
    zoomMiddle(factor) {
      const { clientWidth, clientHeight } = this.$refs.stage;
      this.zoom(factor, clientWidth / 2, clientHeight / 2);
    },
    moveTo(x, y, scale) {
      const { clientWidth, clientHeight } = this.$refs.stage;
      this.scale = scale;
      this.x = Math.min(0, Math.max(clientWidth * (1 - scale), x));
      this.y = Math.min(0, Math.max(clientHeight * (1 - scale), y));
    },
    position(event) {
      const edge = this.$refs.stage.getBoundingClientRect();
      return [event.clientX - edge.left, event.clientY - edge.top];
    },
    wheel(event) {
      if (this.scale === 1 && event.deltaY > 0) return; // the page scrolls on
      event.preventDefault();
      this.zoom(Math.exp(-Math.max(-100, Math.min(100, event.deltaY)) / 300), ...this.position(event));
    },
    double(event) {
      if (this.scale > 1) this.fit();
      else this.zoom(3, ...this.position(event));
    },
    down(event) {
      if (event.pointerType === "mouse" && event.button !== 0) return;
      this.$refs.stage.setPointerCapture(event.pointerId);
      this.fingers.set(event.pointerId, this.position(event));
    },
    move(event) {
      const before = this.fingers.get(event.pointerId);
      if (!before) return;
      const now = this.position(event);
      const others = [...this.fingers.keys()].filter((id) => id !== event.pointerId);
      if (others.length) {
        const other = this.fingers.get(others[0]);
        const apart = Math.hypot(before[0] - other[0], before[1] - other[1]);
        if (apart > 0) this.zoom(Math.hypot(now[0] - other[0], now[1] - other[1]) / apart, ...other);
      } else if (this.scale > 1) {
        this.moveTo(this.x + now[0] - before[0], this.y + now[1] - before[1], this.scale);
      }
      this.fingers.set(event.pointerId, now);
    },
    up(event) {
      this.fingers.delete(event.pointerId);
    },
    key(event) {
      const step = 60;
      const moves = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] };
      if (event.key === "+" || event.key === "=") this.zoomMiddle(1.5);
      else if (event.key === "-") this.zoomMiddle(1 / 1.5);
      else if (event.key === "0") this.fit();
      else if (moves[event.key] && this.scale > 1) {
        this.moveTo(this.x + moves[event.key][0], this.y + moves[event.key][1], this.scale);
      } else return;
      event.preventDefault();
    },
  },
};
