"""An independent reader of event streams: the oracle of every test on the wire.

Written from the HTML standard alone (section 9.2.5 "Parsing an event stream" and 9.2.6 "Interpreting an
event stream"), whose sentences stand beside the code that they justify. It shares nothing with the service.
"""

import codecs
import re
from dataclasses import dataclass

COMMENTS_KEPT = 10_000

# "... a CRLF pair, a single LF not preceded by CR, and a single CR not followed by LF being the only ways
# in which a line can end." So neither str.splitlines (U+2028 and others) nor universal newlines will do.
_LINE_END = re.compile(r"\r\n|\n|\r")


@dataclass(frozen=True, slots=True)
class Message:
    """One dispatched event, as a browser's listener sees it."""

    type: str
    data: str
    last_event_id: str


class EventReader:
    """Turns the bytes of one event stream into messages, however the bytes are cut into chunks.

    `last_event_id` is what a browser would send to resume, `reconnection_time` the last `retry` in
    milliseconds (None: none seen), `comments` the newest COMMENTS_KEPT comments, without their colon.
    """

    def __init__(self) -> None:
        self.comments: list[str] = []
        self.reconnection_time: int | None = None
        self.last_event_id = ""
        # "Streams must be decoded using the UTF-8 decode algorithm", which "strips one leading UTF-8
        # Byte Order Mark (BOM), if any", and replaces what is malformed.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._line = ""
        self._after_cr = False
        self._event_open = False
        # "a data buffer, an event type buffer, and a last event ID buffer must be associated with it. They
        # must be initialized to the empty string."
        self._data = ""
        self._type = ""
        self._id = ""

    def __repr__(self) -> str:
        return f"<EventReader id={self.last_event_id!r} incomplete={self.has_incomplete()}>"

    def feed(self, chunk: bytes) -> list[Message]:
        """Reads the next bytes and returns the messages that they complete."""
        lines = self._take_lines(self._decoder.decode(chunk))
        return [message for line in lines if (message := self._process_line(line)) is not None]

    def has_incomplete(self) -> bool:
        """Whether the end of the stream, now, would cut something off.

        True inside a character, inside a line, and after an `event`, `data` or `id` field that no blank
        line has followed. A whole comment or `retry` line has done its work: nothing is pending after it.
        """
        undecoded, _ = self._decoder.getstate()
        return bool(undecoded or self._line or self._event_open)

    def _take_lines(self, text: str) -> list[str]:
        """The lines that `text` ends. A CR ends its line at once; the LF of its pair may come later."""
        if not text:
            return []
        if self._after_cr:
            text = text.removeprefix("\n")
        self._after_cr = text.endswith("\r")
        *lines, self._line = _LINE_END.split(self._line + text)
        return lines

    def _process_line(self, line: str) -> Message | None:
        # "If the line is empty (a blank line): Dispatch the event, as defined below."
        if not line:
            return self._dispatch()
        # "If the line starts with a U+003A COLON character (:): Ignore the line."
        if line.startswith(":"):
            self._keep_comment(line[1:])
            return None
        # "Collect the characters on the line before the first U+003A COLON character (:), and let field be
        # that string. Collect the characters on the line after [it], and let value be that string. If value
        # starts with a U+0020 SPACE character, remove it from value." Without a colon: "using the whole
        # line as the field name, and the empty string as the field value."
        name, _, value = line.partition(":")
        self._process_field(name, value.removeprefix(" "))
        return None

    def _process_field(self, name: str, value: str) -> None:
        # "Field names must be compared literally, with no case folding performed."
        match name:
            case "event":
                # "Set the event type buffer to the field value."
                self._type = value
                self._event_open = True
            case "data":
                # "Append the field value to the data buffer, then append a single U+000A LINE FEED (LF)
                # character to the data buffer."
                self._data += value + "\n"
                self._event_open = True
            case "id":
                # "If the field value does not contain U+0000 NULL, then set the last event ID buffer to the
                # field value. Otherwise, ignore the field."
                if "\0" not in value:
                    self._id = value
                    self._event_open = True
            case "retry":
                # "If the field value consists of only ASCII digits, then interpret the field value as an
                # integer in base ten [...]. Otherwise, ignore the field."
                if value.isascii() and value.isdigit():
                    self.reconnection_time = int(value)
            case _:
                pass  # "The field is ignored."

    def _dispatch(self) -> Message | None:
        data, event_type = self._data, self._type
        # "Set the data buffer and the event type buffer to the empty string", with an event or without one.
        self._data = self._type = ""
        self._event_open = False
        # "Set the last event ID string of the event source to the value of the last event ID buffer. The
        # buffer does not get reset [...]"
        self.last_event_id = self._id
        # "If the data buffer is an empty string, [...] return."
        if not data:
            return None
        # "If the data buffer's last character is a U+000A LINE FEED (LF) character, then remove the last
        # character from the data buffer." The type is "message" unless "the event type buffer has a value
        # other than the empty string".
        return Message(event_type or "message", data.removesuffix("\n"), self.last_event_id)

    def _keep_comment(self, text: str) -> None:
        self.comments.append(text)
        del self.comments[:-COMMENTS_KEPT]
