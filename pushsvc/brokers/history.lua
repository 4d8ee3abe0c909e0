-- The first events after a position that the histories of some topics hold, read at one moment. What is too old is
-- passed over, and taken away if the server lets itself be written to: it is read also where it does not.
-- ARGV: the sequence after which, the last one that is asked for (0: no such bound), most events, most bytes, topics.
-- Returns EPOCH, newest sequence that retention has taken from these topics, whether there are more (0 or 1), and for
-- each event: sequence, topics (each on a line), BODY.

local after, upto, limit, most = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local log = open_log()
if not log then
  return redis.error_reply('NOLOG there is no log here')
end
local now = clock()
local cut, due = too_old(log, now)
local writable
local function may_write()
  if writable == nil then
    -- Also a full Redis takes this, and then all that follows it.
    writable = type(redis.pcall('DEL', P .. 'none')) == 'number'
  end
  return writable
end
if (cut ~= log.cut or due ~= log.due) and may_write() then
  advance(log, now)
end

local found, order, bytes, more = {}, {}, 0, 0
local last = upto > 0 and upto or nil -- nothing after it belongs to this page

-- The page so far is its first events; what lies behind its last one need not be read.
local function cut_page()
  table.sort(order)
  local kept, total, full = {}, 0, false
  for place, seq in ipairs(order) do
    local size = #found[seq][2]
    full = full or place > limit or (total + size > most and place > 1)
    if full then
      found[seq] = nil
    else
      kept[place] = seq
      total = total + size
    end
  end
  if #kept < #order then
    more = 1
    last = kept[#kept]
  end
  order, bytes = kept, total
end

local function add(topic, seq, body)
  if found[seq] then
    return
  end
  local names = topic
  if body == '' then
    local event = redis.call('HMGET', P .. 'e:' .. text(seq), 't', 'b')
    names, body = event[1], event[2]
    if not body then
      return
    end
  end
  found[seq] = {names, body}
  order[#order + 1] = seq
  bytes = bytes + #body
end

local missing = 0
for place = 5, #ARGV do
  local topic = ARGV[place]
  missing = math.max(missing, tonumber(redis.call('ZSCORE', LOST, topic) or log.floor))
  if cut > 0 then
    local old = redis.call('XREVRANGE', P .. 't:' .. topic, text(cut), '-', 'COUNT', 1)[1]
    if old then
      missing = math.max(missing, tonumber(string.match(old[1], '^%d+')))
      if may_write() then
        trim_old(log, topic)
      end
    end
  end
  local from, count = math.max(after, cut) + 1, 8
  while true do
    local entries = redis.call('XRANGE', P .. 't:' .. topic, text(from), last and text(last) or '+', 'COUNT', count)
    for _, entry in ipairs(entries) do
      from = tonumber(string.match(entry[1], '^%d+')) + 1
      add(topic, from - 1, entry[2][2])
    end
    if #order > 2 * limit or bytes > 2 * most then
      cut_page()
    end
    if #entries < count then
      break
    end
    count = math.min(count * 4, 512)
  end
end
cut_page()

local answer = {log.epoch, text(missing), more}
for _, seq in ipairs(order) do
  answer[#answer + 1] = text(seq)
  answer[#answer + 1] = found[seq][1]
  answer[#answer + 1] = found[seq][2]
end
return answer
