// Methods of nodes, with something of ours behind them; nothing of ours may break what was there.

/** Call `after` behind a method of an object, whatever the page or another pack has put there. */
export function extend(object, method, after) {
  const before = object[method];
  object[method] = function (...args) {
    const result = before?.apply(this, args);
    try {
      after.apply(this, args);
    } catch (error) {
      console.warn("Flexiffusion:", error);
    }
    return result;
  };
}
