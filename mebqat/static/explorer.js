// Draws everything that `explorer.html` has a place for, from the data that `mebqat.figures.pages` embeds.
// Uses `read`, `dark` and `theme` of the page's own script, and Plotly.
{
const data = read('explorer-data');
const $ = id => document.getElementById(id);
const label = b => b === data.fp ? 'FP' : String(b);
const name = (w, a) => w === data.fp && a === data.fp ? 'FP' : `W${label(w)}A${label(a)}`;
const range = n => Array.from({length: n}, (_, i) => i);
const percent = (p, digits = 1) => (100*p).toFixed(digits);
const signed = v => `${v < 0 ? '−' : '+'}${Math.abs(v).toFixed(1)}`;
const escape = s => s.replace(/[&<>"]/g, c => `&#${c.charCodeAt(0)};`);

function numbers(text, wide) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  return wide ? new Int16Array(bytes.buffer) : bytes;
}

// One record per network: its points as columns, and where each pair stands in them.
const networks = data.networks.map(m => ({...m, at: new Map(m.w.map((w, i) => [name(w, m.a[i]), i])),
  answers: m.answers && m.answers.map(t => numbers(t, data.wide)), confidence: m.confidence && m.confidence.map(t => numbers(t))}));
const labels = data.labels && numbers(data.labels, data.wide), pixels = data.images && numbers(data.images.data);
const limits = {}, lowest = Math.min(...networks.flatMap(m => m.accuracy));
for (const cost of ['bytes', 'bitops']) {
  const words = new Map(networks.flatMap(m => m[cost].map((v, i) => [v, m.words[i][cost]])).filter(([v]) => v !== null));
  limits[cost] = [...words].sort((p, q) => p[0] - q[0]);
}
const coarsest = m => range(m.w.length).sort((i, j) => m.w[i]*m.a[i] - m.w[j]*m.a[j])[0];
const finest = m => range(m.w.length).sort((i, j) => m.w[j]*m.a[j] - m.w[i]*m.a[i])[0];

const state = {network: 0, other: Math.min(1, networks.length - 1), view: 'map', w: networks[0].w[coarsest(networks[0])], a: networks[0].a[coarsest(networks[0])],
  bytes: limits.bytes.length, bitops: limits.bitops.length, front: limits.bitops.length ? 'bitops' : 'bytes', full: false, reference: ''};
const network = () => networks[state.network];
const here = () => network().at.get(name(state.w, state.a));

// The choice under a budget, as `Surface.best` makes it.
const allowed = cost => state[cost] < limits[cost].length ? limits[cost][state[cost]][0] : Infinity;
const limited = () => ['bytes', 'bitops'].some(c => state[c] < limits[c].length);
function fits(m, i) { return ['bytes', 'bitops'].every(c => allowed(c) === Infinity || (m[c][i] ?? Infinity) <= allowed(c)); }
function best(m) {
  const order = i => [-m.accuracy[i], m.bytes[i] ?? Infinity, m.bitops[i] ?? Infinity, m.w[i]*m.a[i], m.w[i], m.a[i]];
  return range(m.w.length).filter(i => fits(m, i)).map(i => [order(i), i]).sort(([p], [q]) => { const k = p.findIndex((v, j) => v !== q[j]); return k < 0 ? 0 : p[k] - q[k]; })[0]?.[1];
}
const front = m => (m.front[state.front] || []).map(n => m.at.get(n)).filter(i => fits(m, i));

// Colours and scales
const low = () => state.full ? 0 : Math.min(0.9, Math.floor(lowest*10)/10);
const color = v => getComputedStyle(document.querySelector('.explorer')).getPropertyValue(v).trim();
const grey = () => dark.matches ? 'rgba(29,34,40,0.82)' : 'rgba(255,255,255,0.82)';
const bar = (title, more) => ({thickness: 12, outlinewidth: 0, title: {text: title, side: 'right'}, ...more});
const axis = (bits, title, more) => ({title: {text: title}, tickvals: range(bits.length), ticktext: bits.map(label), range: [-0.5, bits.length - 0.5],
  showgrid: false, zeroline: false, fixedrange: true, ...more});
const place = (m, i) => [data.a.indexOf(m.a[i]), data.w.indexOf(m.w[i])];
const grid = (f, none = null) => data.w.map(w => data.a.map(a => { const i = network().at.get(name(w, a)); return i === undefined ? none : f(i); }));
function hover(m, i) {
  const t = m.words[i], rows = [`<b>${t.name}</b>`, `accuracy ${t.accuracy}`, `interval ${t.interval}`, `n = ${t.n}`];
  return [...rows, t.bytes, t.bitops].filter(Boolean).join('<br>');
}
const marks = (m, some, symbol, more) => ({type: 'scatter', mode: 'markers', hoverinfo: 'skip', showlegend: false, x: some.map(i => place(m, i)[0] + 0.33),
  y: some.map(i => place(m, i)[1] - 0.3), marker: {symbol, size: 9, color: '#fff', line: {width: 1.5, color: '#111'}, ...more}});
const ink = (text, bright) => `<span style="color:${bright ? '#111' : '#fff'}">${text}</span>`;
const cells = data.w.length*data.a.length <= 100;

// The pictures: each gives traces and layout
function flat(z, text, scale) {
  const m = network(), w = data.w.indexOf(state.w), a = data.a.indexOf(state.a), star = best(m);
  const box = (width, colour) => ({type: 'rect', x0: a - 0.47, x1: a + 0.47, y0: w - 0.47, y1: w + 0.47, line: {width, color: colour}});
  const map = {type: 'heatmap', z, text: cells ? text : undefined, texttemplate: '%{text}', textfont: {size: 12}, xgap: 1, ygap: 1, hoverinfo: 'text', hoverongaps: false, ...scale};
  const over = {type: 'heatmap', z: grid(i => fits(m, i) ? null : 1), colorscale: [[0, grey()], [1, grey()]], showscale: false, hoverinfo: 'skip', xgap: 1, ygap: 1};
  return {traces: [map, over, marks(m, front(m).filter(i => !limited() || i !== star), 'diamond'),
                   marks(m, limited() && star !== undefined ? [star] : [], 'star', {size: 15, color: '#ffd166'})],
    layout: {xaxis: axis(data.a, 'activation bits'), yaxis: axis(data.w, 'weight bits', {range: [data.w.length - 0.5, -0.5]}),
      shapes: [box(6, dark.matches ? '#101418' : '#fff'), box(3, color('--mark'))]}};
}
const pictures = {
  map() {
    const m = network(), at = v => (v - low())/(1 - low());
    return flat(grid(i => m.accuracy[i]), grid(i => ink(percent(m.accuracy[i]), at(m.accuracy[i]) >= 0.45), ''),
      {zmin: low(), zmax: 1, colorscale: data.scales.accuracy, hovertext: grid(i => hover(m, i), ''), colorbar: bar('accuracy', {tickformat: '.0%'})});
  },
  difference() {
    const m = network(), o = networks[state.other], there = i => o.at.get(name(m.w[i], m.a[i]));
    const gap = i => there(i) === undefined ? null : 100*(m.accuracy[i] - o.accuracy[there(i)]);
    const reach = Math.max(0.1, ...range(m.w.length).map(i => Math.abs(gap(i) ?? 0)));
    const apart = i => m.low[i] > o.high[there(i)] || o.low[there(i)] > m.high[i];
    const said = i => gap(i) === null ? '' : [`<b>${m.words[i].name}</b>`, `${signed(gap(i))} points`, `${m.words[i].accuracy} against ${o.words[there(i)].accuracy}`,
      `intervals ${apart(i) ? 'apart' : 'overlap'}`].join('<br>');
    return flat(grid(gap), grid(i => gap(i) === null ? '' : ink(signed(gap(i)), Math.abs(gap(i)) <= 0.7*reach), ''),
      {zmin: -reach, zmax: reach, colorscale: data.scales.difference, hovertext: grid(said, ''), colorbar: bar('percentage points', {tickformat: '+.3~g'})});
  },
  relief() {
    const m = network(), every = range(m.w.length), i = here(), z = grid(k => m.accuracy[k]), ring = dark.matches ? '#fff' : '#111';
    const dots = (some, marker, more) => ({type: 'scatter3d', mode: 'markers', x: some.map(k => place(m, k)[0]), y: some.map(k => place(m, k)[1]), z: some.map(k => m.accuracy[k] + lift),
      hovertext: some.map(k => hover(m, k)), hoverinfo: 'text', showlegend: false, marker, ...more});
    const scale = {colorscale: data.scales.accuracy, cmin: low(), cmax: 1}, star = limited() ? [best(m)].filter(k => k !== undefined) : [];
    const lines = {show: true, start: 0, end: 99, size: 1, color: 'rgba(0,0,0,0.25)', width: 1}, lift = (1 - low())/150;
    const flatAxis = (bits, title) => ({tickvals: range(bits.length), ticktext: bits.map(label), title: {text: title}});
    return {traces: [{type: 'surface', z, hoverinfo: 'skip', contours: {x: lines, y: lines}, lighting: {ambient: 0.85, diffuse: 0.4, specular: 0.05}, showscale: false, ...scale},
        dots(every.filter(k => fits(m, k)), {size: 4, color: every.filter(k => fits(m, k)).map(k => m.accuracy[k]), ...scale, line: {width: 1, color: '#777'}}),
        dots(every.filter(k => !fits(m, k)), {size: 3, color: '#888'}),
        dots(star, {size: 8, symbol: 'diamond', color: '#ffd166', line: {width: 1, color: '#111'}}),
        dots(i === undefined ? [] : [i], {size: 9, color: color('--mark'), line: {width: 2, color: ring}},
          {mode: 'markers+text', text: i === undefined ? [] : [m.words[i].name], textposition: 'bottom center', textfont: {color: ring, size: 14}})],
      layout: {scene: {xaxis: flatAxis(data.a, 'activation bits'), yaxis: flatAxis(data.w, 'weight bits'), zaxis: {title: {text: 'accuracy'}, range: [low(), 1.005], tickformat: '.0%'},
        aspectmode: 'manual', aspectratio: {x: 1.1, y: 1.1, z: 0.8}, camera: {eye: {x: -1.55, y: -1.55, z: 0.95}, center: {x: 0, y: 0, z: -0.15}}, uirevision: 'keep'}}};
  },
  cost() {
    const m = network(), cost = state.front, i = here(), star = best(m), every = range(m.w.length).filter(k => m[cost][k] !== null);
    const dots = (some, marker, more) => ({type: 'scatter', mode: 'markers', x: some.map(k => m[cost][k]), y: some.map(k => m.accuracy[k]), customdata: some.map(k => [m.w[k], m.a[k]]),
      hovertext: some.map(k => hover(m, k)), hoverinfo: 'text', showlegend: false, marker, ...more});
    const line = {type: 'line', yref: 'paper', y0: 0, y1: 1, x0: allowed(cost), x1: allowed(cost), line: {dash: 'dot', width: 2, color: color('--soft')}};
    return {traces: [dots(every.filter(k => !fits(m, k)), {size: 8, color: '#999', symbol: 'x-thin', line: {width: 1.5, color: '#999'}}),
        dots(every.filter(k => fits(m, k)), {size: 9, color: color('--good'), opacity: 0.45}),
        dots(front(m), {size: 9, symbol: 'diamond', color: color('--good')}, {mode: 'lines+markers', line: {shape: 'hv', color: color('--good'), width: 2}}),
        dots(limited() && star !== undefined ? [star] : [], {size: 17, symbol: 'star', color: '#ffd166', line: {width: 1.5, color: '#111'}}),
        dots(i === undefined || m[cost][i] === null ? [] : [i], {size: 16, symbol: 'circle-open', color: color('--mark'), line: {width: 3}})],
      layout: {shapes: allowed(cost) < Infinity ? [line] : [], yaxis: {title: {text: 'accuracy'}, range: [low(), 1.01], tickformat: '.0%', fixedrange: true},
        xaxis: {...data.axes[cost], fixedrange: true}}};
  }};

// A move of the chosen pair alone moves its mark; anything else draws anew.
let drawn = '';
function drawPicture() {
  const some = [state.view === 'difference' ? `<b>${escape(network().name)}</b> minus <b>${escape(networks[state.other].name)}</b>: blue where it is better, red where it is worse.` :
    `<b>${escape(network().name)}</b>: accuracy ${state.view === 'cost' ? 'against what it costs' : 'at every pair of bits'}.`,
    state.view === 'relief' ? 'Drag to turn it.' : 'Click a pair to go there.',
    limits[state.front].length && state.view !== 'relief' ? `◆ front: no cheaper pair is as accurate (${state.front === 'bytes' ? 'bytes' : 'BitOPs'}).` : '',
    limited() ? `${state.view === 'relief' ? '◆' : '★'} best within the budget; ${state.view === 'map' || state.view === 'difference' ? 'faded' : 'grey'} pairs do not fit.` : ''];
  $('legend').innerHTML = some.filter(Boolean).join(' ');
  const {traces, layout} = pictures[state.view]();
  const margin = state.view === 'relief' ? {l: 0, r: 0, t: 0, b: 0} : {l: 62, r: 10, t: 10, b: 48};
  const {w, a, reference, ...rest} = state, drawing = JSON.stringify([rest, dark.matches]), mark = traces.at(-1);
  if (drawing !== drawn) Plotly.react('picture', traces, {...layout, margin, template: theme(), hovermode: 'closest', dragmode: state.view === 'relief' ? 'turntable' : false}, {responsive: true, displayModeBar: false});
  else if (state.view === 'map' || state.view === 'difference') Plotly.relayout('picture', {shapes: layout.shapes});
  else Plotly.restyle('picture', Object.fromEntries(['x', 'y', 'z', 'text', 'hovertext', 'customdata'].filter(k => mark[k]).map(k => [k, [mark[k]]])), [traces.length - 1]);
  drawn = drawing;
}

function drawReadout() {
  const m = network(), i = here();
  $('w').value = data.w.indexOf(state.w); $('a').value = data.a.indexOf(state.a);
  for (const k of ['w', 'a']) {
    const said = state[k] === data.fp ? 'full precision' : `${state[k]} bit${state[k] > 1 ? 's' : ''}`;
    $(`${k}-said`).textContent = said; $(k).setAttribute('aria-valuetext', said);
  }
  if (i === undefined) {
    const far = k => Math.abs(m.w[k] - state.w) + Math.abs(m.a[k] - state.a);
    const near = range(m.w.length).sort((p, q) => far(p) - far(q) || m.w[p] - m.w[q] || m.a[p] - m.a[q]).slice(0, 3).map(k => m.words[k].name);
    $('readout').innerHTML = `<strong>${name(state.w, state.a)}</strong><p>was not measured; nearest: ${near.join(', ')}</p><div class="bar">${near.map(n => `<button type="button" data-pair="${n}">${n}</button>`).join('')}</div>`;
    return;
  }
  const t = m.words[i], rows = [['95 % interval', t.interval], [t.unit, t.n], ['weights', t.bytes], ['operations', t.bitops]].filter(r => r[1]);
  const against = m.at.get(state.reference), gap = 100*(m.accuracy[i] - m.accuracy[against]), less = m.bytes[i] && m.bytes[against]/m.bytes[i];
  if (i !== against) {
    rows.push([`against ${m.words[against].name}`, `${signed(gap)} points`]);
    if (less > 1.005) rows.find(r => r[0] === 'weights')[1] += `, ${less.toPrecision(2)}x smaller`;
  }
  const over = fits(m, i) ? '' : '<dt>budget</dt><dd>exceeded</dd>';
  $('readout').innerHTML = `<strong>${t.name}</strong><strong>${t.accuracy}</strong><dl>${rows.map(([k, v]) => `<dt>${k}</dt><dd>${v}</dd>`).join('')}${over}</dl>`;
}

function drawBudget() {
  const m = network(), star = best(m);
  for (const cost of ['bytes', 'bitops']) {
    const said = state[cost] < limits[cost].length ? limits[cost][state[cost]][1] : 'no limit';
    $(cost).value = state[cost]; $(`${cost}-said`).textContent = said; $(cost).setAttribute('aria-valuetext', said);
  }
  $('best').innerHTML = star === undefined ? 'No pair fits.' : `Best${limited() ? ' that fits' : ''}: <b>${m.words[star].name}</b>, ${m.words[star].accuracy}`;
  $('go').disabled = star === undefined || star === here();
}

function drawConfusion() {
  const m = network(), i = here(), k = data.classes.length, count = range(Math.min(k, 100)).map(() => new Array(k).fill(0));
  $('confusion').hidden = k > 100;
  if (i === undefined) { Plotly.react('confusion', [], {template: theme(), xaxis: {visible: false}, yaxis: {visible: false}}); $('confusion-said').textContent = 'Not measured at this pair.'; return; }
  const wrong = m.answers[i].reduce((sum, p, n) => sum + (p !== labels[n]), 0);
  $('confusion-said').innerHTML = `At <b>${m.words[i].name}</b> ${wrong} of ${labels.length} images are wrong. ${k > 100 ? `${k} classes are too many for a picture.` : 'Orange: mistakes; blue: right.'}`;
  if (k > 100) return;
  m.answers[i].forEach((p, n) => count[labels[n]][p]++);
  const total = count.map(row => Math.max(1, row.reduce((x, y) => x + y))), pick = f => count.map((row, t) => row.map((c, p) => f(t, p) && c ? Math.sqrt(c/total[t]) : null));
  const fade = (colour, full) => [[0, colour + '22'], [1, colour + full]], ticks = k <= 30 ? {tickvals: range(k), ticktext: data.classes} : {};
  const part = (z, colorscale) => ({type: 'heatmap', z, zmin: 0, zmax: 1, colorscale, showscale: false, xgap: 1, ygap: 1, hoverongaps: false, hoverinfo: 'text',
    hovertext: count.map((row, t) => row.map((c, p) => `${c} of ${total[t]}: ${escape(data.classes[t])} taken for ${escape(data.classes[p])}`)),
    ...(k <= 20 ? {text: count.map(row => row.map(c => c || '')), texttemplate: '%{text}', textfont: {size: 11, color: color('--text')}} : {})});
  const side = (title, more) => ({title: {text: title}, showgrid: false, zeroline: false, fixedrange: true, range: [-0.5, k - 0.5], tickangle: 0, automargin: true, ...ticks, ...more});
  Plotly.react('confusion', [part(pick((t, p) => t === p), fade(color('--good'), 'b0')), part(pick((t, p) => t !== p), fade(color('--mark'), 'ff'))],
    {margin: {l: 48, r: 6, t: 6, b: 44}, template: theme(), xaxis: side('predicted', data.classes.some(c => c.length > 3) ? {tickangle: -90} : {}), yaxis: side('true', {range: [k - 0.5, -0.5]})},
    {responsive: true, displayModeBar: false});
}

const MOST = 48;
function drawImages() {
  const m = network(), i = here(), r = m.at.get(state.reference);
  if (i === undefined || r === undefined) { $('changed').textContent = 'Not measured at this pair.'; $('images').replaceChildren(); return; }
  const kinds = {lost: [], gained: [], other: []}, was = m.answers[r], now = m.answers[i];
  now.forEach((p, n) => { if (p !== was[n]) kinds[was[n] === labels[n] ? 'lost' : p === labels[n] ? 'gained' : 'other'].push(n); });
  const all = [...kinds.lost, ...kinds.gained, ...kinds.other], shown = all.filter(n => n < data.images.shape[0]).slice(0, MOST);
  $('changed').innerHTML = `<b>${all.length} of ${labels.length}</b> change class from ${escape(state.reference)} to ${m.words[i].name}: ${kinds.lost.length} lost ✗, ${kinds.gained.length} gained ✓, ` +
    `${kinds.other.length} wrong either way.${shown.length < all.length ? ` Shown: ${shown.length}.` : ''}`;
  $('images').replaceChildren(...shown.map(n => thumbnail(n, was[n], now[n], m.confidence[i][n])));
}

function thumbnail(n, was, now, sure) {
  const [, c, h, w] = data.images.shape, canvas = document.createElement('canvas'), box = document.createElement('div'), at = n*c*h*w;
  canvas.width = w; canvas.height = h;
  const image = new ImageData(w, h);
  for (let p = 0; p < h*w; p++) for (let j = 0; j < 4; j++) image.data[4*p + j] = j === 3 ? 255 : pixels[at + (c === 3 ? j*h*w : 0) + p];
  canvas.getContext('2d').putImageData(image, 0, 0);
  const text = `true ${data.classes[labels[n]]}, was ${data.classes[was]}, now ${data.classes[now]} (${Math.round(sure/2.55)} % sure)`;
  canvas.setAttribute('role', 'img'); canvas.setAttribute('aria-label', text); box.title = text;
  const said = document.createElement('span');
  said.className = now === labels[n] ? 'gained' : was === labels[n] ? 'lost' : '';
  said.textContent = `${data.classes[was]} → ${data.classes[now]} ${now === labels[n] ? '✓' : '✗'}`;
  box.append(canvas, said);
  return box;
}

function draw() {
  const m = network(), known = Boolean(m.answers);
  $('other-box').hidden = state.view !== 'difference'; $('full-box').hidden = state.view === 'difference'; $('answers').hidden = !known;
  drawReadout(); drawBudget(); drawPicture();
  if (known) { drawConfusion(); drawImages(); }
}

// What changes with the network
function options(select, entries, chosen) { select.replaceChildren(...entries.map(([value, text]) => new Option(text, value, false, String(value) === String(chosen)))); }
function change(k) {
  state.network = k;
  const m = network();
  if (networks.length > 1 && state.other === k) state.other = networks.findIndex((_, j) => j !== k);
  if (!m.at.has(state.reference)) state.reference = m.words[finest(m)].name;
  options($('other'), networks.map((o, j) => [j, o.name]).filter(([j]) => j !== k), state.other);
  options($('reference'), m.words.map(t => [t.name, t.name]), state.reference);
  $('protocol').innerHTML = Object.entries(m.protocol).map(([key, v]) => `<dt>${escape(key)}</dt><dd>${escape(String(v))}</dd>`).join('');
}
function go(w, a) { state.w = w; state.a = a; draw(); }

options($('method'), networks.map((m, k) => [k, m.name]), 0);
$('w').max = data.w.length - 1; $('a').max = data.a.length - 1;
for (const cost of ['bytes', 'bitops']) { $(cost).max = limits[cost].length; $(`${cost}-box`).hidden = !limits[cost].length; }
$('method-box').hidden = $('difference-box').hidden = networks.length < 2;
$('front-box').hidden = !limits.bytes.length || !limits.bitops.length;
$('budget').hidden = $('cost-box').hidden = !limits.bytes.length && !limits.bitops.length;
const on = (id, event, f) => $(id).addEventListener(event, e => { f(e.target); draw(); });
on('w', 'input', t => { state.w = data.w[t.value]; });
on('a', 'input', t => { state.a = data.a[t.value]; });
for (const cost of ['bytes', 'bitops']) on(cost, 'input', t => { state[cost] = +t.value; });
on('method', 'change', t => change(+t.value));
on('other', 'change', t => { state.other = +t.value; });
on('reference', 'change', t => { state.reference = t.value; });
on('front', 'change', t => { state.front = t.value; });
on('full', 'change', t => { state.full = t.checked; });
on('go', 'click', () => { const k = best(network()); state.w = network().w[k]; state.a = network().a[k]; });
for (const radio of document.querySelectorAll('input[name="view"]')) radio.addEventListener('change', () => { state.view = radio.value; draw(); });
$('readout').addEventListener('click', e => { const k = network().at.get(e.target.dataset.pair); if (k !== undefined) go(network().w[k], network().a[k]); });
dark.addEventListener('change', draw);
change(0);
draw();
$('picture').on('plotly_click', e => {
  const p = e.points[0], [w, a] = p.customdata || [data.w[Math.round(p.y)], data.a[Math.round(p.x)]];
  if (network().at.has(name(w, a))) go(w, a);
});
}
