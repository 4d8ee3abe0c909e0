-- The log in Redis: its keys, and what every script of it shares. All keys begin with the prefix P (KEYS[1]).
--
--   P log      HASH    epoch, seq: the position of the newest event; run: the server's life in which the epoch began;
--                      start: the sequence that the epoch began after; at: when the newest event was published;
--                      events, age, window: what retention and idempotency ask (events per topic, ms, s); cut: newest sequence that is too old for history; check: when
--                      the newest entry of P ages was made; due: when the oldest one is due, 0: never; swept: how far idle
--                      topics have been swept; floor: newest sequence whose mark P lost has forgotten; thin: how far
--                      all topics have been looked through for what are too many, since events was set anew
--   P past     HASH    earlier epoch -> "SEQ START": at which it ended, and that it began after, if that is known; numbers
--                      go on through all epochs
--   P ages     LIST    "SEQ AT", oldest first: events up to SEQ were published at AT (ms) or before
--   P last     ZSET    topic -> sequence of the newest event published to it, kept or not
--   P lost     ZSET    topic -> newest sequence that retention has taken from its history
--   P t:TOPIC  STREAM  its history: SEQ-0 -> b BODY, or an empty b: the event has several topics and is in P e:SEQ
--   P k:TOPIC  HASH    key -> sequence of the `latest` event that its history holds
--   P e:SEQ    HASH    an event of several topics: n: how many histories hold it, t: its topics, b: BODY
--   P i:KEY    STRING  "EPOCH FIRST COUNT": the answer to an idempotency key; it expires
--
-- BODY is "AT KEEP RETRY EVENT KEY DATA", each on a line of its own, DATA being the rest: AT in ms, KEEP empty, l or
-- n for all, latest and none, EVENT empty for "message". No name has a line feed (a control character).
--
-- The channel of a topic is C TOPIC, C being "P DB:": channels are common to all databases of a server. A message is
-- "EPOCH SEQ PREV FORM", a line feed and its content; PREV is the topic's sequence before, 0 for none that is known.
-- FORM 1: BODY. FORM n: n topics, each on a line, then BODY. FORM 0: KEEP, and the event is in P e:SEQ.

local P = KEYS[1]
local LOG, AGES, LAST, LOST = P .. 'log', P .. 'ages', P .. 'last', P .. 'lost'
local MARKS = 100000
local SWEEP, SWEEP_FULL = 4, 64 -- idle topics that a publish sees to at least, and one that a full Redis refuses
local DEFAULTS = {events = 10000, age = 86400000, window = 86400} -- until a worker has told its own
local budget = 20000 -- entries and topics that one script takes away at most: Redis serves nobody meanwhile

local function text(number)
  return string.format('%.0f', number)
end

local function clock()
  local now = redis.call('TIME')
  return tonumber(now[1]) * 1000 + math.floor(tonumber(now[2]) / 1000)
end

-- A command that is the first to write, also in a full Redis: one lets a script end that has begun to take away.
local function write(...)
  redis.call('DEL', P .. 'none')
  return redis.call(...)
end

local function open_log()
  local found = redis.call('HMGET', LOG, 'epoch', 'seq', 'at', 'events', 'age', 'window', 'cut', 'check', 'due',
    'swept', 'floor')
  if not found[1] then
    return nil
  end
  local log = {epoch = found[1]}
  for place, name in ipairs({'seq', 'at', 'events', 'age', 'window', 'cut', 'check', 'due', 'swept', 'floor'}) do
    log[name] = tonumber(found[place + 1] or DEFAULTS[name] or 0)
  end
  return log
end

-- The newest sequence that is too old for history, when the next ones will be (0: there are none), and how many entries
-- of P ages say nothing more. Writes nothing.
local function too_old(log, now)
  if log.at + log.age <= now then
    return log.seq, 0, -1
  end
  local cut, due, gone = log.cut, log.due, 0
  while due > 0 and due <= now do
    local seq, at = string.match(redis.call('LINDEX', AGES, gone) or '', '^(%d+) (%d+)$')
    due = seq and tonumber(at) + log.age or 0
    if due > 0 and due <= now then
      cut, gone = math.max(cut, tonumber(seq)), gone + 1
    end
  end
  return cut, due, gone
end

local function advance(log, now)
  local cut, due, gone = too_old(log, now)
  if cut == log.cut and due == log.due then
    return
  end
  log.cut, log.due = cut, due
  if gone < 0 then
    redis.call('DEL', AGES)
  else
    redis.call('LTRIM', AGES, gone, -1)
  end
  redis.call('HSET', LOG, 'cut', text(cut), 'due', text(due))
end

-- What an entry of a topic's history leaves behind when it goes: its share of an event of several topics, and its key.
local function release(topic, seq, body)
  local key = P .. 'e:' .. seq
  local shared = body == ''
  if shared then
    body = redis.call('HGET', key, 'b') or ''
  end
  local held = string.match(body, '^%d+\nl\n%d*\n[^\n]*\n([^\n]*)\n')
  if held and redis.call('HGET', P .. 'k:' .. topic, held) == seq then
    redis.call('HDEL', P .. 'k:' .. topic, held)
  end
  if shared and redis.call('HINCRBY', key, 'n', -1) <= 0 then
    redis.call('DEL', key)
  end
end

local function mark_lost(log, topic, seq)
  redis.call('ZADD', LOST, 'GT', seq, topic)
  if redis.call('ZCARD', LOST) > MARKS then
    log.floor = math.max(log.floor, tonumber(redis.call('ZPOPMIN', LOST)[2]))
    redis.call('HSET', LOG, 'floor', text(log.floor))
  end
end

-- Take entries, the oldest ones, out of a topic's history.
local function trim(log, topic, entries)
  local last = string.match(entries[#entries][1], '^%d+')
  -- A full Redis lets a script end whose first write takes something away.
  redis.call('XTRIM', P .. 't:' .. topic, 'MINID', text(tonumber(last) + 1))
  for _, entry in ipairs(entries) do
    release(topic, string.match(entry[1], '^%d+'), entry[2][2])
  end
  mark_lost(log, topic, last)
end

-- Whether nothing that is too old is left.
local function trim_old(log, topic)
  while log.cut > 0 and budget > 0 do
    local entries = redis.call('XRANGE', P .. 't:' .. topic, '-', text(log.cut), 'COUNT', 200)
    if #entries == 0 then
      return true
    end
    trim(log, topic, entries)
    budget = budget - #entries
  end
  return log.cut == 0
end

-- What is more than history is to hold: of the oldest `least` in any case, more of them within the budget.
local function trim_many(log, topic, least)
  local over = redis.call('XLEN', P .. 't:' .. topic) - log.events
  over = math.min(over, least + math.max(budget, 0))
  budget = budget - math.max(over - least, 0)
  while over > 0 do
    local entries = redis.call('XRANGE', P .. 't:' .. topic, '-', '+', 'COUNT', math.min(200, over))
    trim(log, topic, entries)
    over = over - #entries
  end
end

-- After events was set anew: all topics, once, some at a time.
local function thin_out(log, most)
  local place = redis.call('HGET', LOG, 'thin')
  if not place then
    return
  end
  local found = redis.call('ZSCAN', LAST, place, 'COUNT', most)
  for number = 1, #found[2], 2 do
    trim_many(log, found[2][number], 0)
  end
  if budget > 0 and found[1] ~= '0' then
    redis.call('HSET', LOG, 'thin', found[1])
  elseif budget > 0 then
    redis.call('HDEL', LOG, 'thin')
  end
end

-- Topics that nobody has published to since log.cut leave, some at a time.
local function sweep(log, most)
  if log.swept >= log.cut then
    return
  end
  local idle = redis.call('ZRANGE', LAST, 0, math.min(most, math.max(budget, 1)) - 1, 'WITHSCORES')
  for place = 1, #idle, 2 do
    if tonumber(idle[place + 1]) > log.cut or not trim_old(log, idle[place]) then
      break
    end
    budget = budget - 1
    redis.call('DEL', P .. 't:' .. idle[place], P .. 'k:' .. idle[place])
    redis.call('ZREM', LAST, idle[place])
  end
  local first = redis.call('ZRANGE', LAST, 0, 0, 'WITHSCORES')
  if not first[1] or tonumber(first[2]) > log.cut then
    redis.call('HSET', LOG, 'swept', text(log.cut))
  end
end
