// The page's part of a dark test: extra streams to a canary, for as long as the service asks for them. What comes on them
// is thrown away. Nothing happens unless the page calls
//
//     pushsvcDark("https://push.example", {canary: "https://canary.example"});
//
// service: where the orders come from. canary: the only origin to which streams are opened, whatever an order says; it
// has to name the page's origin in PUSHSVC_CORS_ORIGINS. topic: of the orders. most: streams of this page at most; a
// browser has six connections per host over HTTP/1.1, and many more over HTTP/2. Returns a function that ends it all.
//
// An order is an event `pushsvc-dark` with {url, streams, percent, seconds}: open `streams` to `url` if this page is among
// the first `percent` of a hundred, for so many seconds from now, 15 at most; it is given again and again. Each page draws
// its place once, so a greater share includes the smaller one. An order without streams, or none in time, ends them.
function pushsvcDark(service, {canary, topic = "pushsvc-dark", most = 5}) {
  const longest = 15; // seconds
  const place = Math.random() * 100;
  let streams = [];
  let timer = 0;

  function stop() {
    clearTimeout(timer);
    streams.forEach(stream => stream.close());
    streams = [];
  }

  function obey({url, streams: count, percent, seconds}) {
    const left = Math.min(seconds, longest) * 1000;
    if (!url || new URL(url).origin !== new URL(canary).origin || place >= percent || !(left > 0)) return stop();
    clearTimeout(timer);
    timer = setTimeout(stop, left);
    while (streams.length > Math.min(count, most)) streams.pop().close();
    while (streams.length < Math.min(count, most)) streams.push(new EventSource(url));
  }

  const orders = new EventSource(`${service}/events?${new URLSearchParams({topic})}`);
  orders.addEventListener("pushsvc-dark", event => {
    try {
      obey(JSON.parse(event.data));
    } catch {
      stop(); // what cannot be read is no order
    }
  });
  return () => { orders.close(); stop(); };
}
