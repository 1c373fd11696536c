// Before anything is drawn: the look that was chosen, so that a dark page does not flash white.
try {
  const { theme } = JSON.parse(localStorage.getItem("crosschip.settings")) ?? {};
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // nothing kept: the system's look
}
