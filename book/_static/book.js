// Hovering or focusing a link to an equation, figure, exercise, section or citation shows what it
// leads to. Escape or leaving closes it. The page linked to is fetched once, from this site only.
// The theme asks Bootstrap for tips on its buttons; their titles say the same.
window.bootstrap = { Tooltip: class {} };

(() => {
  const pages = new Map();
  let box, timer, current;

  const pageOf = (url) => {
    if (url.pathname === location.pathname) return Promise.resolve(document);
    if (!pages.has(url.pathname)) {
      pages.set(url.pathname, fetch(url.pathname)
        .then((reply) => (reply.ok ? reply.text() : Promise.reject(reply.status)))
        .then((text) => new DOMParser().parseFromString(text, "text/html")));
    }
    return pages.get(url.pathname);
  };

  // What to show of a target: the box itself, or a section's heading and its first paragraphs.
  const excerpt = (page, id) => {
    const target = page.getElementById(id);
    if (!target) return [];
    if (target.matches("dt")) return [target, target.nextElementSibling].filter(Boolean);
    const section = target.matches("section") ? target : target.matches("span") && target.closest("section");
    if (!section) return [target];
    return [...section.children].filter((child) => child.matches("h1, h2, h3, p, div.math, ul")).slice(0, 3);
  };

  const close = () => {
    clearTimeout(timer);
    box?.remove();
    current?.removeAttribute("aria-describedby");
    box = current = undefined;
  };

  const open = async (link) => {
    const url = new URL(link.href);
    const parts = excerpt(await pageOf(url), decodeURIComponent(url.hash.slice(1)));
    if (current !== link || !parts.length) return;
    box = Object.assign(document.createElement("div"), { id: "book-preview", className: "book-preview" });
    box.setAttribute("role", "tooltip");
    for (const part of parts) {
      const copy = document.importNode(part, true);
      copy.removeAttribute("id");
      for (const node of copy.querySelectorAll("[id]")) node.removeAttribute("id");
      for (const image of copy.querySelectorAll("img")) image.src = new URL(image.getAttribute("src"), url);
      box.append(copy);
    }
    document.querySelector(".bd-article").append(box);
    link.setAttribute("aria-describedby", "book-preview");
    if (url.pathname !== location.pathname) await window.MathJax?.typesetPromise?.([box]);
    if (!box) return;
    const at = link.getBoundingClientRect(), size = box.getBoundingClientRect();
    const below = at.bottom + size.height + 12 < innerHeight || at.top < size.height + 12;
    const left = Math.max(16, Math.min(at.left, document.documentElement.clientWidth - size.width - 16));
    const parent = box.offsetParent?.getBoundingClientRect() ?? { left: 0, top: 0 };
    box.style.left = `${left - parent.left}px`;
    box.style.top = `${(below ? at.bottom + 6 : at.top - size.height - 6) - parent.top}px`;
    box.addEventListener("mouseenter", () => clearTimeout(timer));
    box.addEventListener("mouseleave", close);
  };

  const begin = (link, wait) => {
    close();
    current = link;
    timer = setTimeout(() => open(link).catch(close), wait);
  };

  // The menus of the page's header: a click opens and closes them, Escape and a click elsewhere close.
  const menus = () => {
    const buttons = [...document.querySelectorAll('[data-bs-toggle="dropdown"]')];
    const set = (button, open) => {
      button.setAttribute("aria-expanded", open);
      button.classList.toggle("show", open);
      button.parentElement.querySelector(".dropdown-menu")?.classList.toggle("show", open);
    };
    document.addEventListener("click", ({ target }) => {
      for (const button of buttons) {
        set(button, button.contains(target) && button.getAttribute("aria-expanded") !== "true");
      }
    });
    document.addEventListener("keydown", ({ key }) => {
      if (key === "Escape") for (const button of buttons) set(button, false);
    });
  };

  // What scrolls inside itself can be reached and scrolled with the keyboard.
  const letScroll = () => {
    for (const box of document.querySelectorAll("article div.math, article pre, .pst-scrollable-table-container, .cell_output")) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    }
  };

  addEventListener("load", async () => {
    letScroll();
    await window.MathJax?.startup?.promise;
    letScroll();
    addEventListener("resize", letScroll);
  });

  document.addEventListener("DOMContentLoaded", () => {
    menus();
    if (location.pathname.includes("/book/")) {
      for (const link of document.querySelectorAll("a.lab-only")) link.hidden = false;
    }
    const links = document.querySelectorAll('.bd-article a.reference.internal[href*="#"], .bd-article a.sphinx-codeautolink-a');
    for (const link of links) {
      if (new URL(link.href).origin !== location.origin) continue;
      link.addEventListener("mouseenter", () => begin(link, 250));
      link.addEventListener("focus", () => link.matches(":focus-visible") && begin(link, 250));
      link.addEventListener("mouseleave", () => { clearTimeout(timer); timer = setTimeout(close, 250); });
      link.addEventListener("blur", close);
    }
    document.addEventListener("keydown", (event) => event.key === "Escape" && close());
  });
})();
