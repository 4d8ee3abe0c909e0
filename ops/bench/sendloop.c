/* The kernel's price: what a fan-out costs when nothing is done but send(2).
 *
 * usage: sendloop PORT
 *
 * GET anything   answers the head of an event stream and keeps the connection
 * POST anything  calls send(2) with the body, as it is, for each of those connections; then answers 200
 *
 * One thread, one epoll set, no parsing but of the length of a POST. A full socket is waited for.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum { EVENTS = 256, BODY = 1 << 20, WAIT_MS = 1000 };

static const char HEAD[] = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-store\r\n"
                           "Transfer-Encoding: chunked\r\n\r\n10\r\nretry: 3000\n: \n\n\r\n";
static const char DONE[] = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";

static int *streams;   /* descriptors, packed */
static int *place;     /* descriptor -> index in streams, or -1 */
static int count;
static char request[BODY + 4096];

static void die(const char *what) { perror(what); exit(1); }

static void forget(int fd)
{
    if (place[fd] >= 0) {
        int last = streams[--count];
        streams[place[fd]] = last;
        place[last] = place[fd];
        place[fd] = -1;
    }
    close(fd);
}

static void send_all(int fd, const char *data, size_t size)
{
    while (size) {
        ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
        if (sent >= 0) {
            data += sent;
            size -= sent;
        } else if (errno != EAGAIN || poll(&(struct pollfd){fd, POLLOUT, 0}, 1, WAIT_MS) != 1) {
            return; /* it hangs up, or is stuck: its hang-up is seen by epoll */
        }
    }
}

static void publish(int fd, size_t have)
{
    char *end, *field;
    size_t size;
    request[have] = 0;
    if (!(end = strstr(request, "\r\n\r\n")) || !(field = strcasestr(request, "\r\ncontent-length:"))) {
        forget(fd);
        return;
    }
    size = strtoul(field + 17, NULL, 10);
    end += 4;
    while (have < (size_t)(end - request) + size) { /* the publisher sends at once: waiting for it is all there is to do */
        ssize_t more = recv(fd, request + have, sizeof request - 1 - have, 0);
        if (more > 0)
            have += more;
        else if (more == 0 || errno != EAGAIN || poll(&(struct pollfd){fd, POLLIN, 0}, 1, WAIT_MS) != 1) {
            forget(fd);
            return;
        }
    }
    for (int i = 0; i < count; i++)
        send_all(streams[i], end, size);
    send_all(fd, DONE, sizeof DONE - 1);
}

static void serve(int fd)
{
    ssize_t have = recv(fd, request, sizeof request - 1, 0);
    if (have < 0 && errno == EAGAIN)
        return;
    if (have <= 0) {
        forget(fd);
    } else if (request[0] == 'P') {
        publish(fd, have);
    } else if (place[fd] < 0) {
        place[fd] = count;
        streams[count++] = fd;
        send_all(fd, HEAD, sizeof HEAD - 1);
    }
}

static void accept_all(int listener, int poller)
{
    int fd, one = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        place[fd] = -1;
        epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
    }
}

int main(int argc, char **argv)
{
    struct rlimit limit;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct epoll_event ready[EVENTS], event = {.events = EPOLLIN};
    int one = 1, poller = epoll_create1(0), listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

    if (argc != 2)
        return fprintf(stderr, "usage: sendloop PORT\n"), 2;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    if (!(streams = calloc(limit.rlim_cur, sizeof *streams)) || !(place = calloc(limit.rlim_cur, sizeof *place)))
        die("memory");
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    address.sin_port = htons(atoi(argv[1]));
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096))
        die("listen");
    event.data.fd = listener;
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int n = epoll_wait(poller, ready, EVENTS, -1);
        for (int i = 0; i < n; i++) {
            if (ready[i].data.fd == listener)
                accept_all(listener, poller);
            else
                serve(ready[i].data.fd);
        }
    }
}
