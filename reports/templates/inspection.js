"use strict";
// The reader: tokens as spans, one of them chosen; what the memory heads retrieved for it stands beside the text.
(function () {
  var data = JSON.parse(document.getElementById("data").textContent);
  var pane = document.getElementById("text"), detail = document.getElementById("detail");
  var passageChoice = document.getElementById("passage"), colourChoice = document.getElementById("colour");
  var passage = null, spans = [], chosen = -1, trail = [];
  var heads = data.layers.length * data.heads;
  var CLAIMED = ["definition", "defined name", "name", "rare word", "citation"];
  var KIND_COLOURS = { "definition": "#ffd37a", "defined name": "#bfe3c0", "name": "#b9d9f5", "rare word": "#f3c1d9", "citation": "#d9c8f2" };

  function startsOf(text) {
    if (!text.starts) {
      var at = 0;
      text.starts = text.steps.map(function (step) { at += step; return at; });
      // Offsets count whole characters; JavaScript counts an emoji as two.
      text.letters = Array.from(text.text);
    }
    return text.starts;
  }

  function slice(text, first, last) {
    var starts = startsOf(text);
    var from = starts[Math.max(0, first)], to = last < starts.length ? starts[last] : text.letters.length;
    return text.letters.slice(from, to).join("");
  }

  function gainOf(place) { return passage.without[place] - passage.loss[place]; }

  // Blue for gain, orange for loss of prediction; light enough that the text keeps its contrast.
  function diverging(value) {
    var strength = Math.min(1, Math.abs(value) / 4) * 0.62;
    return value >= 0 ? "rgba(0,114,178," + strength + ")" : "rgba(213,94,0," + strength + ")";
  }

  function colourOf(place) {
    switch (colourChoice.value) {
      case "loss": return "rgba(110,64,160," + Math.min(1, passage.loss[place] / 10) * 0.55 + ")";
      case "twin": return diverging(passage.twin[place] - passage.loss[place]);
      case "share": return "rgba(0,114,178," + Math.max(0, mean(passage.share[place])) / 100 * 0.6 + ")";
      case "kind": return KIND_COLOURS[data.kinds[passage.kind[place]]] || "transparent";
      default: return diverging(gainOf(place));
    }
  }

  function mean(values) {
    return values.reduce(function (sum, value) { return sum + value; }, 0) / Math.max(1, values.length);
  }

  function swatch(colour, text) {
    var mark = document.createElement("i");
    mark.className = "swatch";
    mark.style.background = colour;
    return [mark, document.createTextNode(text)];
  }

  function legend() {
    var box = document.getElementById("legend"), parts = [];
    box.textContent = "";
    if (colourChoice.value === "kind") {
      CLAIMED.forEach(function (kind) { parts = parts.concat(swatch(KIND_COLOURS[kind], kind)); });
    } else if (colourChoice.value === "loss") {
      parts = swatch("rgba(110,64,160,.05)", "0").concat(swatch("rgba(110,64,160,.55)", "10 nats"));
    } else if (colourChoice.value === "share") {
      parts = swatch("rgba(0,114,178,.05)", "0 %").concat(swatch("rgba(0,114,178,.6)", "100 %"));
    } else {
      parts = swatch(diverging(-4), "4 nats worse").concat(swatch(diverging(0), "no change"), swatch(diverging(4), "4 nats better"));
    }
    parts.forEach(function (part) { box.appendChild(part); });
  }

  function paint() {
    spans.forEach(function (span, place) { span.style.backgroundColor = colourOf(place); });
    legend();
  }

  function open(number) {
    passage = data.passages[number];
    passageChoice.value = String(number);
    var text = data.documents[passage.document], fragment = document.createDocumentFragment();
    chosen = -1;
    trail = [];
    spans = passage.kind.map(function (_, place) {
      var span = document.createElement("span");
      var position = passage.first + place, piece = slice(text, position, position + 1);
      // Tokens that are parts of one character share its place: the last of them shows it.
      span.textContent = piece;
      span.id = "token-" + place;
      span.setAttribute("role", "option");
      span.setAttribute("aria-selected", "false");
      span.dataset.place = place;
      fragment.appendChild(span);
      return span;
    });
    pane.textContent = "";
    pane.appendChild(fragment);
    pane.scrollTop = 0;
    pane.removeAttribute("aria-activedescendant");
    detail.innerHTML = "<p class=\"soft\">No token is chosen yet.</p>";
    paint();
  }

  function element(name, className, text) {
    var made = document.createElement(name);
    if (className) { made.className = className; }
    if (text !== undefined) { made.textContent = text; }
    return made;
  }

  function nats(value) { return value.toFixed(2).replace("-", "−"); }
  function signed(value) { return (value >= 0 ? "+" : "−") + Math.abs(value).toFixed(2); }

  function visible(text) { return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥"); }

  function matchesOf(place, head) {
    var found = [];
    for (var rank = 0; rank < data.keep; rank += 1) {
      var at = head * data.keep + rank, position = passage.retrieved[place][at];
      if (position >= 0) {
        found.push({ position: position, weight: passage.weight[place][at], origin: passage.origin ? passage.origin[place][at] : -1 });
      }
    }
    return found;
  }

  function snippet(match) {
    var text = match.origin >= 0 ? data.stored[match.origin] : data.documents[passage.document];
    var box = element("span", "snippet");
    box.appendChild(element("span", "soft", visible(slice(text, match.position - 10, match.position))));
    box.appendChild(element("mark", "", visible(slice(text, match.position, match.position + 1))));
    box.appendChild(element("span", "soft", visible(slice(text, match.position + 1, match.position + 7))));
    return box;
  }

  function describe(place) {
    var text = data.documents[passage.document], position = passage.first + place;
    detail.textContent = "";
    detail.appendChild(element("h3", "", "“" + visible(slice(text, position, position + 1)) + "”"));
    var kind = data.kinds[passage.kind[place]], seen = data.occurrences[passage.occurrence[place]];
    detail.appendChild(element("p", "soft", kind + (passage.occurrence[place] < 3 ? ", " + seen : "") + "; token " + position));
    var figures = "Loss " + nats(passage.loss[place]) + " with memory, " + nats(passage.without[place]) + " without";
    if (passage.twin) { figures += ", twin " + nats(passage.twin[place]); }
    detail.appendChild(element("p", "", figures + ". Gain " + signed(gainOf(place)) + " nats."));
    var any = false;
    for (var head = 0; head < heads; head += 1) {
      var matches = matchesOf(place, head);
      if (!matches.length) { continue; }
      any = true;
      var share = passage.share[place][head];
      var title = "Layer " + data.layers[Math.floor(head / data.heads)] + ", head " + (head % data.heads);
      detail.appendChild(element("h4", "", title + (share >= 0 ? ": " + share + " % memory" : "")));
      var list = element("ol");
      matches.forEach(function (match) {
        var item = element("li"), button = element("button");
        button.type = "button";
        button.appendChild(snippet(match));
        var where = match.origin >= 0 ? data.stored[match.origin].name + ", token " + match.position
          : (position - match.position) + " tokens back";
        button.appendChild(element("span", "soft", " " + where + ", weight " + match.weight + " %"));
        var meter = element("span", "meter"), bar = element("i");
        bar.style.width = match.weight + "%";
        meter.appendChild(bar);
        button.appendChild(meter);
        button.addEventListener("click", function () { follow(match); });
        item.appendChild(button);
        list.appendChild(item);
      });
      detail.appendChild(list);
    }
    if (!any) { detail.appendChild(element("p", "soft", "Nothing was retrieved: the memory was empty.")); }
  }

  function markSources(place) {
    spans.forEach(function (span) { span.classList.remove("source"); });
    for (var head = 0; head < heads; head += 1) {
      matchesOf(place, head).forEach(function (match) {
        var there = spans[match.position - passage.first];
        if (match.origin < 0 && there) { there.classList.add("source"); }
      });
    }
  }

  function choose(place, scroll) {
    if (place < 0 || place >= spans.length) { return; }
    if (chosen >= 0) {
      spans[chosen].classList.remove("chosen");
      spans[chosen].setAttribute("aria-selected", "false");
    }
    chosen = place;
    var span = spans[place];
    span.classList.add("chosen");
    span.setAttribute("aria-selected", "true");
    pane.setAttribute("aria-activedescendant", span.id);
    if (scroll) {
      var top = span.offsetTop, bottom = top + span.offsetHeight;
      if (top < pane.scrollTop + 20 || bottom > pane.scrollTop + pane.clientHeight - 20) {
        pane.scrollTop = top - pane.clientHeight / 2;
      }
    }
    describe(place);
    markSources(place);
  }

  function follow(match) {
    var place = match.position - passage.first;
    if (match.origin < 0 && place >= 0 && place < spans.length) {
      trail.push(chosen);
      choose(place, true);
      pane.focus();
    }
  }

  function byLine(direction) {
    // The nearest token of the line above or below, as in a text field.
    var here = spans[chosen].getBoundingClientRect(), best = -1, least = Infinity;
    for (var place = chosen + direction; place >= 0 && place < spans.length; place += direction) {
      var box = spans[place].getBoundingClientRect();
      var lines = Math.abs(box.top - here.top) / 20;
      if (lines < 0.5 || !spans[place].textContent.trim()) { continue; }
      if (lines > 4 && best >= 0) { break; }
      var far = lines * 1000 + Math.abs(box.left - here.left);
      if (far < least) { least = far; best = place; }
    }
    return best < 0 ? chosen : best;
  }

  pane.addEventListener("click", function (event) {
    var place = event.target.dataset ? event.target.dataset.place : undefined;
    if (place !== undefined) { trail = []; choose(Number(place), false); }
  });

  pane.addEventListener("keydown", function (event) {
    if (event.altKey || event.ctrlKey || event.metaKey) { return; }
    var next = null;
    if (chosen < 0 && /^(Arrow|Home|End|Enter)/.test(event.key)) { next = 0; }
    else if (event.key === "ArrowRight") { next = Math.min(spans.length - 1, chosen + 1); }
    else if (event.key === "ArrowLeft") { next = Math.max(0, chosen - 1); }
    else if (event.key === "ArrowDown") { next = byLine(1); }
    else if (event.key === "ArrowUp") { next = byLine(-1); }
    else if (event.key === "Home") { next = 0; }
    else if (event.key === "End") { next = spans.length - 1; }
    else if (event.key === "Escape" && trail.length) { next = trail.pop(); }
    else if (event.key === "Enter") {
      var all = [];
      for (var head = 0; head < heads; head += 1) { all = all.concat(matchesOf(chosen, head)); }
      var reachable = all.filter(function (match) { return match.origin < 0 && spans[match.position - passage.first]; });
      reachable.sort(function (a, b) { return b.weight - a.weight; });
      if (reachable.length) { follow(reachable[0]); }
      event.preventDefault();
      return;
    }
    if (next !== null) { event.preventDefault(); choose(next, true); }
  });

  passageChoice.addEventListener("change", function () { open(Number(passageChoice.value)); });
  colourChoice.addEventListener("change", paint);
  document.querySelectorAll(".strongest button").forEach(function (button) {
    button.addEventListener("click", function () {
      open(Number(button.dataset.passage));
      document.getElementById("reader").scrollIntoView();
      choose(Number(button.dataset.place), true);
      pane.focus({ preventScroll: true });
    });
  });

  if (data.passages.length) {
    open(0);
    // Begin with the token that memory helped most, so that the page shows at once what it is for.
    var best = 0;
    passage.loss.forEach(function (_, place) { if (gainOf(place) > gainOf(best)) { best = place; } });
    choose(best, true);
  }
  document.documentElement.dataset.ready = "yes";
})();
