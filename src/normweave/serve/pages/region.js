// Draws the region of interest over an image: polygons, rectangles and strokes of a brush, to look at or to leave out.
// Coordinates are shares of width and height. After each change the shapes are sent as `drawn`; strokes become a mask.
const MASK_SIDE = 1024; // longer side of a mask in pixels
const CLOSE = 0.025; // a click this near to the first corner, in shares of the longer side, closes a polygon
const STEP = 0.01; // of the cursor by the arrow keys; with Shift ten times that
const empty = () => ({ polygons: [], rectangles: [], strokes: [], mask: "" });

export default {
  props: { image: String, label: String, region: Object, version: Number },
  template: `
    <figure class="region">
      <div class="region-tools" role="toolbar" aria-label="Tools">
        <fieldset><legend>Shape</legend>
          <button v-for="name in ['polygon', 'rectangle', 'brush']" type="button" :aria-pressed="String(tool === name)"
                  @click="choose(name)">{{ name }}</button>
        </fieldset>
        <fieldset><legend>Use</legend>
          <button v-for="(name, key) in { include: 'look here', ignore: 'leave out' }" type="button"
                  :aria-pressed="String(part === key)" @click="part = key">{{ name }}</button>
        </fieldset>
        <label v-if="tool === 'brush'">Brush <input type="range" min="1" max="15" step="1" v-model.number="brush" aria-label="Width of the brush"></label>
        <fieldset><legend>Steps</legend>
          <button type="button" :disabled="!past.length && !points.length" @click="undo">undo</button>
          <button type="button" :disabled="!future.length" @click="redo">redo</button>
          <button type="button" :disabled="blank" @click="clear">clear</button>
        </fieldset>
      </div>
      <div ref="stage" class="region-stage" tabindex="0" role="application" :aria-label="label"
           :style="{ aspectRatio: width + ' / ' + height, '--ratio': width / height }"
           @pointerdown="down" @pointermove="move" @pointerup="up" @pointercancel="cancel" @dblclick="close" @keydown="key">
        <img :src="image" alt="" draggable="false" @load="loaded">
        <svg :viewBox="'0 0 ' + width + ' ' + height" preserveAspectRatio="none" aria-hidden="true">
          <filter id="region-invert" color-interpolation-filters="sRGB" x="0" y="0" width="100%" height="100%">
            <feComponentTransfer>
              <feFuncR type="table" tableValues="1 0"/><feFuncG type="table" tableValues="1 0"/><feFuncB type="table" tableValues="1 0"/>
            </feComponentTransfer>
          </filter>
          <mask v-for="name in ['include', 'ignore']" :id="'region-' + name" maskUnits="userSpaceOnUse" x="0" y="0" :width="width" :height="height">
            <g :filter="name === 'include' ? 'url(#region-invert)' : null">
              <rect :width="width" :height="height" :fill="name === 'include' && all ? 'white' : 'black'"/>
              <image v-if="shapes[name].mask" :href="'data:image/png;base64,' + shapes[name].mask" :width="width" :height="height" preserveAspectRatio="none"/>
              <polygon v-for="one in shapes[name].polygons" :points="line(one)" fill="white" fill-rule="evenodd"/>
              <rect v-for="one in shapes[name].rectangles" :x="one[0] * width" :y="one[1] * height" :width="one[2] * width" :height="one[3] * height" fill="white"/>
              <polyline v-for="one in shapes[name].strokes" :points="line(one.points)" :stroke-width="one.width * longer" class="stroke"/>
            </g>
          </mask>
          <rect :width="width" :height="height" class="dark" mask="url(#region-include)"/>
          <rect :width="width" :height="height" class="dark" mask="url(#region-ignore)"/>
          <g v-for="name in ['include', 'ignore']" :class="name">
            <polygon v-for="one in shapes[name].polygons" :points="line(one)"/>
            <rect v-for="one in shapes[name].rectangles" :x="one[0] * width" :y="one[1] * height" :width="one[2] * width" :height="one[3] * height"/>
          </g>
          <g v-if="points.length" :class="[part, 'unfinished']">
            <polyline :points="line(at ? [...points, at] : points)"/>
            <circle v-for="one in points" :cx="one[0] * width" :cy="one[1] * height" :r="longer * 0.008"/>
          </g>
          <rect v-if="dragged" :class="[part, 'unfinished']" :x="dragged[0] * width" :y="dragged[1] * height" :width="dragged[2] * width" :height="dragged[3] * height"/>
          <path v-if="cursor" class="cursor" :d="cross"/>
        </svg>
      </div>
      <figcaption class="soft">{{ hint }}</figcaption>
    </figure>`,
  data() {
    return {
      tool: "polygon", part: "include", brush: 5, width: 4, height: 3, shapes: { include: empty(), ignore: empty() },
      points: [], start: null, at: null, stroke: null, cursor: null, past: [], future: [],
    };
  },
  created() {
    this.take();
  },
  watch: {
    version() {
      this.take();
    },
  },
  computed: {
    longer() {
      return Math.max(this.width, this.height);
    },
    blank() {
      return Object.values(this.shapes).every((one) => !this.filled(one));
    },
    all() {
      return !this.filled(this.shapes.include);
    },
    dragged() {
      if (this.tool !== "rectangle" || !this.start || !this.at) return null;
      const [left, right] = [this.start[0], this.at[0]].sort((a, b) => a - b);
      const [top, bottom] = [this.start[1], this.at[1]].sort((a, b) => a - b);
      return [left, top, right - left, bottom - top];
    },
    cross() {
      const [x, y, r] = [this.cursor[0] * this.width, this.cursor[1] * this.height, this.longer * 0.02];
      return `M${x - r} ${y}H${x + r}M${x} ${y - r}V${y + r}`;
    },
    hint() {
      return {
        polygon: "Click the corners; click the first one again, double-click or press Enter twice to close. Keys: arrows, Enter, Backspace.",
        rectangle: "Drag from corner to corner, or move with the arrows and press Enter at two corners.",
        brush: "Drag to paint, or move with the arrows and press Enter for a dot.",
      }[this.tool];
    },
  },
  methods: {
    filled(one) {
      return one.polygons.length + one.rectangles.length + one.strokes.length > 0 || one.mask !== "";
    },
    take() {
      const given = this.region || {};
      this.shapes = { include: { ...empty(), ...given.include }, ignore: { ...empty(), ...given.ignore } };
      this.past = [];
      this.future = [];
      this.stop();
    },
    stop() {
      this.points = [];
      this.start = this.stroke = this.at = null;
    },
    choose(name) {
      this.tool = name;
      this.stop();
    },
    loaded(event) {
      this.width = event.target.naturalWidth;
      this.height = event.target.naturalHeight;
    },
    line(points) {
      return points.map(([x, y]) => `${x * this.width},${y * this.height}`).join(" ");
    },
    place(event) {
      const edge = this.$refs.stage.getBoundingClientRect();
      const share = (value) => Math.round(1e4 * Math.min(1, Math.max(0, value))) / 1e4;
      return [share((event.clientX - edge.left) / edge.width), share((event.clientY - edge.top) / edge.height)];
    },
    near(one, other) {
      return Math.hypot((one[0] - other[0]) * this.width, (one[1] - other[1]) * this.height) < CLOSE * this.longer;
    },
    down(event) {
      if (event.pointerType === "mouse" && event.button !== 0) return;
      this.cursor = null;
      this.$refs.stage.setPointerCapture(event.pointerId);
      this.begin(this.place(event));
    },
    begin(point) {
      if (this.tool === "polygon") this.corner(point);
      else if (this.tool === "rectangle") [this.start, this.at] = [point, point];
      else {
        this.remember();
        this.stroke = { points: [point, point], width: this.brush / 100 };
        this.shapes[this.part].strokes.push(this.stroke);
        this.stroke = this.shapes[this.part].strokes.at(-1);
      }
    },
    corner(point) {
      if (this.points.length >= 3 && this.near(point, this.points[0])) this.close();
      else if (!this.points.length || !this.near(point, this.points.at(-1))) this.points.push(point);
      else if (this.points.length >= 3) this.close();
    },
    close() {
      if (this.tool !== "polygon" || this.points.length < 3) return;
      const polygon = this.points;
      this.stop();
      this.remember();
      this.shapes[this.part].polygons.push(polygon);
      this.changed();
    },
    move(event) {
      const point = this.place(event);
      if (this.stroke && !this.near(point, this.stroke.points.at(-1))) this.stroke.points.push(point);
      if (this.points.length || this.start) this.at = point;
    },
    up(event) {
      if (this.stroke) {
        this.stroke.points.push(this.place(event));
        this.stroke = null;
        this.changed();
      } else if (this.start) this.end(this.place(event));
    },
    end(point) {
      this.at = point;
      const rectangle = this.dragged.map((value) => Math.round(1e4 * value) / 1e4);
      this.stop();
      if (Math.min(rectangle[2], rectangle[3]) < 0.005) return;
      this.remember();
      this.shapes[this.part].rectangles.push(rectangle);
      this.changed();
    },
    cancel() {
      if (this.stroke) this.undo();
      this.stop();
    },
    key(event) {
      const far = event.shiftKey ? 10 * STEP : STEP;
      const moves = { ArrowLeft: [-far, 0], ArrowRight: [far, 0], ArrowUp: [0, -far], ArrowDown: [0, far] };
      if (moves[event.key]) {
        const from = this.cursor || [0.5, 0.5];
        this.cursor = from.map((value, axis) => Math.round(1e4 * Math.min(1, Math.max(0, value + moves[event.key][axis]))) / 1e4);
        if (this.points.length || this.start) this.at = this.cursor;
      } else if (event.key === "Enter") {
        this.cursor ||= [0.5, 0.5];
        if (this.start) this.end(this.cursor);
        else this.begin(this.cursor);
        if (this.stroke) {
          this.stroke = null;
          this.changed();
        }
      } else if (event.key === "Escape") this.stop();
      else if (event.key === "Backspace" && this.points.length) this.points.pop();
      else if ((event.ctrlKey || event.metaKey) && event.key === "z") this.undo();
      else if ((event.ctrlKey || event.metaKey) && event.key === "y") this.redo();
      else return;
      event.preventDefault();
    },
    copy() {
      return JSON.parse(JSON.stringify(this.shapes));
    },
    remember() {
      this.past.push(this.copy());
      this.future = [];
    },
    undo() {
      if (this.points.length) this.points.pop();
      else if (this.past.length) {
        this.future.push(this.copy());
        this.shapes = this.past.pop();
        this.changed();
      }
    },
    redo() {
      this.past.push(this.copy());
      this.shapes = this.future.pop();
      this.changed();
    },
    clear() {
      this.remember();
      this.stop();
      this.shapes = { include: empty(), ignore: empty() };
      this.changed();
    },
    async changed() {
      const drawn = {};
      for (const name of ["include", "ignore"]) {
        const { polygons, rectangles } = this.shapes[name];
        drawn[name] = { polygons, rectangles, mask: await this.mask(this.shapes[name]) };
      }
      this.$emit("drawn", JSON.parse(JSON.stringify(drawn)));
    },
    async mask({ strokes, mask }) {
      if (!strokes.length) return mask;
      const canvas = document.createElement("canvas");
      const scale = MASK_SIDE / this.longer;
      canvas.width = Math.max(1, Math.round(this.width * scale));
      canvas.height = Math.max(1, Math.round(this.height * scale));
      const pen = canvas.getContext("2d");
      pen.fillStyle = "black";
      pen.fillRect(0, 0, canvas.width, canvas.height);
      if (mask) {
        const before = new Image();
        before.src = `data:image/png;base64,${mask}`;
        await before.decode();
        pen.drawImage(before, 0, 0, canvas.width, canvas.height);
      }
      pen.strokeStyle = "white";
      pen.lineCap = pen.lineJoin = "round";
      for (const { points, width } of strokes) {
        pen.lineWidth = width * Math.max(canvas.width, canvas.height);
        pen.beginPath();
        points.forEach(([x, y], number) => pen[number ? "lineTo" : "moveTo"](x * canvas.width, y * canvas.height));
        pen.stroke();
      }
      return canvas.toDataURL("image/png").split(",")[1];
    },
  },
};
