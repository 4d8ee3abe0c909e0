"""Views: parse, authorise, call the hub or the broker, build the response. Nothing is decided here that lasts."""
