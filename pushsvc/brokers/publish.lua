-- Appends events, all or none, in one stretch of the order, and tells those who listen.
-- ARGV: C, the idempotency key or an empty string, then for each event: how many topics, the topics, KEEP, KEY, and
-- BODY without its first line. Returns "EPOCH FIRST COUNT"; without events it only tries whether it can write. A full
-- Redis refuses it, and is rid of what is too old or too many in these topics, and in some that are idle.

local C, idempotency = ARGV[1], ARGV[2]
local INLINE = 32 -- an event of more topics is not sent with each of its messages, but fetched once
local PASSING = 60 -- seconds for which such an event that no history holds can be fetched

local log = open_log()
if not log then
  return redis.error_reply('NOLOG there is no log here')
end
if idempotency ~= '' then
  local answer = redis.call('GET', P .. 'i:' .. idempotency)
  if answer then
    -- WAIT counts who has what this connection has sent to replicas last: also this, after the events of another one.
    -- To nobody's channel, for no server refuses it.
    redis.call('PUBLISH', C, '')
    return answer
  end
end

local now = clock()
local first, count, many, at = log.seq + 1, 0, 0, 3
while ARGV[at] do
  count, many = count + 1, many + tonumber(ARGV[at])
  at = at + tonumber(ARGV[at]) + 4
end

local function make_room()
  redis.call('DEL', P .. 'none') -- a full Redis lets a script go on that begins so
  advance(log, now)
  at = 3
  while ARGV[at] do
    for place = 1, tonumber(ARGV[at]) do
      trim_old(log, ARGV[at + place])
      trim_many(log, ARGV[at + place], 0)
    end
    at = at + tonumber(ARGV[at]) + 4
  end
  sweep(log, SWEEP_FULL)
  thin_out(log, SWEEP_FULL)
end

-- The first thing written is one that a full Redis refuses: from then on it lets this script end.
local written
if count > 0 then
  written = redis.pcall('HSET', LOG, 'seq', text(log.seq + count), 'at', text(now))
else
  written = redis.pcall('HSET', LOG, 'probe', text(now))
end
if type(written) == 'table' then
  if string.find(written.err, 'OOM', 1, true) then
    make_room()
  end
  return written
elseif count == 0 then
  return log.epoch .. ' ' .. text(first) .. ' 0'
end
if idempotency ~= '' then
  redis.call('SET', P .. 'i:' .. idempotency, log.epoch .. ' ' .. text(first) .. ' ' .. count, 'EX', log.window)
end
advance(log, now)
local gone_back = log.check > now + log.age / 1000
if gone_back then -- the clock: what the one before it says would stay for as long as it was ahead
  redis.call('DEL', AGES)
  log.at, log.due = now, 0
end
if log.check + log.age / 1000 <= now or gone_back then
  if log.seq > log.cut then
    redis.call('RPUSH', AGES, text(log.seq) .. ' ' .. text(log.at))
    if log.due == 0 then
      log.due = log.at + log.age
    end
  end
  redis.call('HSET', LOG, 'check', text(now), 'due', text(log.due))
end

local function hold(topic, seq, keep, key, body)
  local history = P .. 't:' .. topic
  if keep == 'l' then
    local older = redis.call('HGET', P .. 'k:' .. topic, key)
    if older then
      local entry = redis.call('XRANGE', history, older, older)[1]
      if entry then
        release(topic, older, entry[2][2])
        redis.call('XDEL', history, entry[1])
      end
    end
    redis.call('HSET', P .. 'k:' .. topic, key, seq)
  end
  redis.call('XADD', history, seq .. '-0', 'b', body)
  trim_old(log, topic)
  trim_many(log, topic, 1) -- as many as come leave: a topic that holds too many for a while never grows
end

local function append(seq, topics, keep, key, rest)
  local body = text(now) .. '\n' .. rest
  local head, tail = log.epoch .. ' ' .. seq .. ' ', ' 1\n' .. body
  local entry = body
  if #topics > 1 then
    local names = table.concat(topics, '\n')
    tail = #topics > INLINE and ' 0\n' .. keep or ' ' .. #topics .. '\n' .. names .. '\n' .. body
    if keep ~= 'n' or #topics > INLINE then
      redis.call('HSET', P .. 'e:' .. seq, 'n', #topics, 't', names, 'b', body)
    end
    if keep == 'n' and #topics > INLINE then
      redis.call('EXPIRE', P .. 'e:' .. seq, PASSING)
    end
    entry = ''
  end
  for _, topic in ipairs(topics) do
    local previous = text(tonumber(redis.call('ZSCORE', LAST, topic) or 0))
    redis.call('ZADD', LAST, seq, topic)
    if keep ~= 'n' then
      hold(topic, seq, keep, key, entry)
    end
    redis.call('PUBLISH', C .. topic, head .. previous .. tail)
  end
end

at = 3
for number = 0, count - 1 do
  local many = tonumber(ARGV[at])
  local topics = {}
  for place = 1, many do
    topics[place] = ARGV[at + place]
  end
  append(text(first + number), topics, ARGV[at + many + 1], ARGV[at + many + 2], ARGV[at + many + 3])
  at = at + many + 4
end
sweep(log, math.max(SWEEP, 2 * many)) -- more than can come
return log.epoch .. ' ' .. text(first) .. ' ' .. count
