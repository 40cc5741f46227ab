// The page of a quire server. What a model says is only ever put into text nodes.
"use strict";

const $ = (id) => document.getElementById(id);
const log = $("log");

// -- the conversation ---------------------------------------------------------------------------

let messages = []; // as the server gets them, without the system prompt
let awaited = []; // calls of tools whose results are to be typed in
let running = null; // the AbortController of the answer that is being written

function headers() {
  const key = $("key").value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Changes the page, and stays at its end if that is what is being looked at.
function show(change) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function addMessage(role, title, text) {
  const message = element("article", `message ${role}`);
  message.append(element("h3", "", title));
  if (text !== undefined) message.append(element("div", "text", text));
  $("empty").hidden = true;
  show(() => log.append(message));
  return message;
}

function addError(parent, text) {
  const error = element("p", "error", text);
  error.setAttribute("role", "alert");
  show(() => parent.append(error));
}

// An answer as it is written: reasoning, text, calls of tools.
class Answer {
  constructor(title) {
    this.content = "";
    this.calls = [];
    this.finish = null;
    this.usage = null;
    this.article = addMessage("assistant busy", title);
    this.article.setAttribute("aria-busy", "true"); // read out as a whole, not word by word
    this.reasoning = null;
    this.text = null;
    this.callNodes = [];
  }

  take(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    for (const choice of chunk.choices || []) {
      const delta = choice.delta || {};
      show(() => {
        if (delta.reasoning_content) this.addReasoning(delta.reasoning_content);
        if (delta.content) this.addText(delta.content);
        for (const call of delta.tool_calls || []) this.addCall(call);
      });
      if (choice.finish_reason) this.finish = choice.finish_reason;
    }
  }

  addReasoning(text) {
    if (!this.reasoning) {
      const details = element("details", "reasoning");
      details.open = true;
      this.reasoning = document.createTextNode("");
      const body = element("div");
      body.append(this.reasoning);
      details.append(element("summary", "", "Reasoning"), body);
      this.article.append(details);
    }
    this.reasoning.appendData(text);
  }

  addText(text) {
    if (!this.text) {
      this.text = document.createTextNode("");
      const body = element("div", "text");
      body.append(this.text);
      this.article.append(body);
    }
    this.content += text;
    this.text.appendData(text);
  }

  addCall(delta) {
    const index = delta.index || 0;
    if (!this.calls[index]) {
      this.calls[index] = { id: "", type: "function", function: { name: "", arguments: "" } };
      const nodes = { name: element("span", "name"), arguments: document.createTextNode("") };
      const code = element("code");
      code.append(nodes.name, "(", nodes.arguments, ")");
      const block = element("div", "call");
      block.append(code);
      this.article.append(block);
      this.callNodes[index] = nodes;
    }
    const call = this.calls[index];
    const given = delta.function || {};
    if (delta.id) call.id = delta.id;
    if (given.name) call.function.name += given.name;
    if (given.arguments) call.function.arguments += given.arguments;
    this.callNodes[index].name.textContent = call.function.name;
    this.callNodes[index].arguments.data = call.function.arguments;
  }

  end(note) {
    this.article.classList.remove("busy");
    this.article.removeAttribute("aria-busy");
    if (note) show(() => this.article.append(element("footer", "", note)));
  }

  get isEmpty() {
    return !this.content && this.calls.length === 0;
  }

  message() {
    if (!this.calls.length) return { role: "assistant", content: this.content };
    return { role: "assistant", content: this.content || null, tool_calls: this.calls };
  }
}

function requestBody() {
  const system = $("system").value.trim();
  const body = {
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
  };
  if ($("model").value) body.model = $("model").value;
  for (const input of document.querySelectorAll("[data-field]")) {
    if (input.validity.badInput) throw new Error(`${input.id}: not a number`);
    if (input.value !== "") body[input.id] = Number(input.value);
  }
  const tools = $("tools").value.trim();
  if (tools) {
    try {
      body.tools = JSON.parse(tools);
    } catch (error) {
      throw new Error(`Tools: ${error.message}`);
    }
  }
  return JSON.stringify(body);
}

async function failure(response) {
  const text = await response.text();
  let message = text;
  try {
    message = JSON.parse(text).error.message || text;
  } catch {
    // not in OpenAI's shape, so a proxy's: shown as it is
  }
  if (response.status === 401) $("key").focus();
  return new Error(`${response.status}: ${message || response.statusText}`);
}

// Yields what server-sent events hold, in pieces of any size.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function ask(text) {
  const said = awaited.length
    ? { role: "tool", tool_call_id: awaited[0].id, content: text }
    : { role: "user", content: text };
  addMessage(said.role, awaited.length ? `Result of ${awaited[0].function.name}` : "You", text);
  messages.push(said);
  if (awaited.length) {
    awaited.shift();
    if (awaited.length) return describePrompt();
  }
  const controller = new AbortController();
  const conversation = messages;
  setRunning(controller);
  const answer = new Answer($("model").value || "Model");
  const started = performance.now();
  let first = 0;
  let problem = null;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: requestBody(),
      signal: controller.signal,
    });
    if (!response.ok) throw await failure(response);
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message || "the server failed");
      answer.take(chunk);
      if (!first && (!answer.isEmpty || answer.reasoning)) first = performance.now();
    }
    if (!answer.finish) throw new Error("the connection ended before the answer did");
  } catch (error) {
    if (error.name !== "AbortError") problem = error;
  }
  answer.end(note(answer, started, first, controller.signal.aborted));
  if (problem) addError(answer.article, problem.message);
  if (conversation === messages) {
    keep(answer, said);
    setRunning(null);
    describePrompt();
  }
}

// What was said so far stays said; a message that got no answer goes back to where it came from.
function keep(answer, said) {
  if (!answer.isEmpty || answer.finish) {
    // A call that was cut off has no result that could be sent.
    if (answer.finish !== "tool_calls") answer.calls = [];
    messages.push(answer.message());
    awaited = answer.calls.slice();
  } else if (said.role === "user") {
    messages.pop();
    if (!$("prompt").value) $("prompt").value = said.content;
  }
}

function note(answer, started, first, stopped) {
  const parts = [];
  if (stopped) parts.push("stopped");
  if (answer.finish === "length") parts.push("cut off: max tokens");
  const count = answer.usage && answer.usage.completion_tokens;
  if (count) {
    parts.push(`${count} token${count === 1 ? "" : "s"}`);
    const seconds = (performance.now() - first) / 1000;
    if (first && count > 1 && seconds > 0) parts.push(`${((count - 1) / seconds).toFixed(1)} tok/s`);
  }
  if (first) parts.push(`first after ${Math.round(first - started)} ms`);
  return parts.join(" · ");
}

function setRunning(controller) {
  running = controller;
  $("send").hidden = Boolean(controller);
  $("stop").hidden = !controller;
}

function describePrompt() {
  const text = awaited.length ? `Result of ${awaited[0].function.name}` : "Message";
  $("prompt").placeholder = $("prompt-label").textContent = text;
}

function send() {
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  ask(text);
}

function stop() {
  if (running) running.abort();
  $("prompt").focus();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});

$("parameters").addEventListener("submit", (event) => event.preventDefault());

$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});

$("stop").addEventListener("click", stop);

$("clear").addEventListener("click", () => {
  if (running) running.abort();
  messages = [];
  awaited = [];
  setRunning(null);
  log.replaceChildren($("empty"));
  $("empty").hidden = false;
  describePrompt();
  $("prompt").focus();
});

// What was typed into the parameters stays until the tab is closed.
for (const input of document.querySelectorAll("[data-keep]")) {
  const name = `quire.${input.id}`;
  input.value = sessionStorage.getItem(name) || "";
  input.addEventListener("input", () => sessionStorage.setItem(name, input.value));
}

// -- the server ---------------------------------------------------------------------------------

function setState(kind, text) {
  $("state").className = `state ${kind}`;
  if ($("state").textContent !== text) $("state").textContent = text;
}

async function loadModels() {
  const select = $("model");
  const response = await fetch("v1/models", { headers: headers() });
  if (response.status === 401) throw new Error("needs an API key");
  if (!response.ok) throw new Error(`answers ${response.status}`);
  const chosen = select.value;
  const names = (await response.json()).data.map((model) => model.id);
  select.replaceChildren(...names.map((name) => element("option", "", name)));
  if (names.includes(chosen)) select.value = chosen;
  select.disabled = false;
}

const LENGTH = 120; // points of a chart, one a second
const series = { running: [], waiting: [], cache: [], rate: [] };
let before = null;

// Sums each metric over its labels; the prefix of the names is the server's to choose.
function parseMetrics(text) {
  const wanted =
    /^(?:\w+[:_])?(num_requests_running|num_requests_waiting|kv_cache_usage_perc|generation_tokens_total)(?:\{.*\})?\s+(\S+)/;
  const found = {};
  for (const line of text.split("\n")) {
    const match = wanted.exec(line);
    if (match) found[match[1]] = (found[match[1]] || 0) + Number(match[2]);
  }
  return found;
}

function push(name, value) {
  series[name].push(value);
  if (series[name].length > LENGTH) series[name].shift();
}

function take(metrics) {
  const now = performance.now();
  const total = metrics.generation_tokens_total;
  // A count that went down is that of a server that was started anew.
  const rate =
    before && total >= before.total ? (1000 * (total - before.total)) / (now - before.now) : 0;
  before = { now, total };
  push("running", metrics.num_requests_running || 0);
  push("waiting", metrics.num_requests_waiting || 0);
  push("cache", 100 * (metrics.kv_cache_usage_perc || 0));
  push("rate", rate || 0);
}

function draw(canvas, lines, most) {
  const scale = window.devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const pen = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  pen.scale(scale, scale);
  pen.strokeStyle = color("--line");
  pen.lineWidth = 1;
  for (const part of [0.25, 0.5, 0.75]) {
    const y = Math.round(height * part) + 0.5;
    pen.beginPath();
    pen.moveTo(0, y);
    pen.lineTo(width, y);
    pen.stroke();
  }
  const x = (i, count) => width - ((count - 1 - i) * width) / (LENGTH - 1);
  const y = (value) => height - 3 - ((height - 6) * value) / most;
  for (const [name, values] of lines) {
    if (!values.length) continue;
    pen.beginPath();
    values.forEach((value, i) => pen.lineTo(x(i, values.length), y(value)));
    pen.strokeStyle = pen.fillStyle = color(name);
    pen.lineWidth = 1.75;
    pen.lineJoin = "round";
    pen.stroke();
    pen.lineTo(width, height);
    pen.lineTo(x(0, values.length), height);
    pen.globalAlpha = 0.14;
    pen.fill();
    pen.globalAlpha = 1;
  }
  pen.fillStyle = color("--soft");
  pen.font = "10px system-ui, sans-serif";
  pen.fillText(String(Math.round(most)), 4, 11);
}

function drawAll() {
  const last = (name) => series[name][series[name].length - 1];
  if (last("running") !== undefined) {
    $("running").textContent = last("running");
    $("waiting").textContent = last("waiting");
    $("cache").textContent = `${last("cache").toFixed(1)} %`;
    $("rate").textContent = last("rate").toFixed(1);
  }
  const most = (least, ...names) => Math.max(least, ...names.flatMap((name) => series[name]));
  const requests = [["--accent", series.running], ["--second", series.waiting]];
  draw($("requests-chart"), requests, most(4, "running", "waiting"));
  draw($("cache-chart"), [["--accent", series.cache]], 100);
  draw($("rate-chart"), [["--accent", series.rate]], most(10, "rate"));
}

function explain(text) {
  $("no-metrics").hidden = !text;
  $("no-metrics").textContent = text;
}

async function poll() {
  try {
    if ($("model").disabled) await loadModels();
    const response = await fetch("metrics", { headers: headers() });
    setState("good", "connected");
    if (response.ok) {
      take(parseMetrics(await response.text()));
      explain("");
    } else {
      explain(
        response.status === 401 ? "Figures need the API key." : "This server shows no figures.",
      );
    }
  } catch (error) {
    setState("bad", error instanceof TypeError ? "no connection" : error.message);
  }
  drawAll();
}

$("key").addEventListener("change", () => {
  $("model").disabled = true;
  poll();
});

window.addEventListener("resize", drawAll);

async function watch() {
  if (!document.hidden) await poll();
  setTimeout(watch, 1000);
}

watch();
