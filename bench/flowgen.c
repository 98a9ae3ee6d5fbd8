/*
 * flowgen: the first packet of many new connections, from an interface, as quickly as the machine can.
 *
 *     flowgen INTERFACE DESTINATION-MAC udp|tcp MILLISECONDS FRAMES-PER-SECOND CONNECTIONS <TEMPLATES
 *
 * A template is a line "SOURCE/LENGTH DESTINATION/LENGTH PORT". Every frame takes one of them at random. The source's
 * bits that its length leaves open and the source port come from a counter, so no two frames are of the same
 * connection; the destination's open bits, and a port of 0, are random. TCP frames are SYNs. After so many CONNECTIONS
 * the same ones come again (0: never). FRAMES-PER-SECOND 0 means: no limit.
 *
 * Frames go out by sendmmsg on a packet socket past the queueing discipline. Prints "SENT NANOSECONDS".
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <netinet/udp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { FRAME = 60, BATCH = 64, FIRST_PORT = 1024, PORTS = 64000 };

struct template {
    uint32_t source, source_open, destination, destination_open;
    uint16_t port;
};

struct frame {
    unsigned char nothing[2]; /* so that what follows the 14 bytes of Ethernet is aligned */
    struct ethhdr ether;
    struct iphdr ip;
    union {
        struct udphdr udp;
        struct tcphdr tcp;
        unsigned char rest[FRAME - sizeof(struct ethhdr) - sizeof(struct iphdr)];
    };
};

static void fail(const char *what)
{
    fprintf(stderr, "flowgen: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

/* One round of a mixing function (Steele's splitmix64): the same counter gives the same frame. */
static uint64_t mixed(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static uint32_t sum(const void *data, size_t bytes, uint32_t total)
{
    const unsigned char *byte = data;
    for (size_t i = 0; i < bytes; i += 2)
        total += byte[i] << 8 | byte[i + 1];
    return total;
}

static uint16_t folded(uint32_t total)
{
    while (total >> 16)
        total = (total & 0xffff) + (total >> 16);
    return htons(~total);
}

static uint32_t open_bits(int length)
{
    return length == 0 ? ~0u : (1u << (32 - length)) - 1;
}

static struct template *read_templates(size_t *count)
{
    size_t room = 1024;
    struct template *all = malloc(room * sizeof *all);
    char source[16], destination[16];
    int source_length, destination_length;
    unsigned port;

    *count = 0;
    while (scanf("%15[0-9.]/%d %15[0-9.]/%d %u ", source, &source_length, destination, &destination_length, &port) == 5) {
        if (*count == room)
            all = realloc(all, (room *= 2) * sizeof *all);
        if (!all)
            fail("memory");
        all[(*count)++] = (struct template){ntohl(inet_addr(source)), open_bits(source_length), ntohl(inet_addr(destination)),
                                            open_bits(destination_length), port};
    }
    if (!feof(stdin) || *count == 0) {
        errno = EINVAL;
        fail("templates on stdin");
    }
    return all;
}

static int packet_socket(const char *interface, struct frame *model)
{
    int one = 1, room = 1 << 24, opened = socket(AF_PACKET, SOCK_RAW, 0);
    struct ifreq request = {0};
    struct sockaddr_ll address = {.sll_family = AF_PACKET};

    if (opened < 0)
        fail("socket");
    strncpy(request.ifr_name, interface, IFNAMSIZ - 1);
    if (ioctl(opened, SIOCGIFHWADDR, &request))
        fail(interface);
    memcpy(model->ether.h_source, request.ifr_hwaddr.sa_data, ETH_ALEN);
    address.sll_ifindex = if_nametoindex(interface);
    if (bind(opened, (struct sockaddr *)&address, sizeof address) ||
        setsockopt(opened, SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof room) ||
        setsockopt(opened, SOL_PACKET, PACKET_QDISC_BYPASS, &one, sizeof one))
        fail(interface);
    return opened;
}

static void fill(struct frame *frame, const struct template *templates, size_t count, uint64_t counter)
{
    uint64_t chance = mixed(counter);
    const struct template *template = &templates[(chance >> 32) * count >> 32];
    struct iphdr *ip = &frame->ip;
    uint32_t source = template->source | ((counter / PORTS) & template->source_open);
    uint32_t destination = template->destination | (mixed(chance) & template->destination_open);
    uint16_t port = template->port ? template->port : FIRST_PORT + chance % PORTS;
    uint32_t pseudo;

    ip->saddr = htonl(source);
    ip->daddr = htonl(destination);
    ip->check = 0;
    ip->check = folded(sum(ip, sizeof *ip, 0));
    frame->udp.source = htons(FIRST_PORT + counter % PORTS);
    frame->udp.dest = htons(port); /* TCP has its ports at the same place */
    if (ip->protocol == IPPROTO_TCP) {
        pseudo = sum(&ip->saddr, 8, IPPROTO_TCP + sizeof(struct tcphdr));
        frame->tcp.check = 0;
        frame->tcp.check = folded(sum(&frame->tcp, sizeof frame->tcp, pseudo));
    }
}

int main(int argc, char **argv)
{
    static struct frame frames[BATCH];
    static struct iovec vectors[BATCH];
    static struct mmsghdr messages[BATCH];
    struct frame *model = &frames[0];
    uint64_t counter = 0, begin, end, length, connections;
    struct template *templates;
    double rate;
    size_t count;
    int out;

    if (argc != 7 || sscanf(argv[2], "%hhx:%hhx:%hhx:%hhx:%hhx:%hhx", &model->ether.h_dest[0], &model->ether.h_dest[1],
                            &model->ether.h_dest[2], &model->ether.h_dest[3], &model->ether.h_dest[4], &model->ether.h_dest[5]) != 6) {
        errno = EINVAL;
        fail("INTERFACE DESTINATION-MAC udp|tcp MILLISECONDS FRAMES-PER-SECOND CONNECTIONS");
    }
    length = strtoull(argv[4], 0, 10) * 1000000;
    rate = strtod(argv[5], 0);
    connections = strtoull(argv[6], 0, 10);
    templates = read_templates(&count);
    out = packet_socket(argv[1], model);

    model->ether.h_proto = htons(ETH_P_IP);
    model->ip = (struct iphdr){.version = 4, .ihl = 5, .ttl = 64};
    if (strcmp(argv[3], "tcp") == 0) {
        model->ip.protocol = IPPROTO_TCP;
        model->ip.tot_len = htons(sizeof(struct iphdr) + sizeof(struct tcphdr));
        model->tcp.seq = htonl(1);
        model->tcp.doff = sizeof(struct tcphdr) / 4;
        model->tcp.syn = 1;
        model->tcp.window = htons(65535);
    } else {
        model->ip.protocol = IPPROTO_UDP;
        model->ip.tot_len = htons(FRAME - sizeof(struct ethhdr));
        model->udp.len = htons(FRAME - sizeof(struct ethhdr) - sizeof(struct iphdr)); /* checksum 0: none */
    }
    for (int i = 0; i < BATCH; i++) {
        frames[i] = *model;
        vectors[i] = (struct iovec){&frames[i].ether, FRAME};
        messages[i].msg_hdr = (struct msghdr){.msg_iov = &vectors[i], .msg_iovlen = 1};
    }

    begin = now();
    while ((end = now()) < begin + length) {
        if (rate > 0 && counter > rate * (end - begin) / 1e9)
            continue; /* ahead of the rate: the next look at the clock is the wait */
        for (int i = 0; i < BATCH; i++)
            fill(&frames[i], templates, count, connections ? (counter + i) % connections : counter + i);
        for (int sent = 0; sent < BATCH;) {
            int went = sendmmsg(out, messages + sent, BATCH - sent, 0);
            if (went < 0 && errno != ENOBUFS && errno != EAGAIN)
                fail("sendmmsg");
            sent += went < 0 ? 1 : went; /* a frame that did not fit is lost */
        }
        counter += BATCH;
    }
    printf("%llu %llu\n", (unsigned long long)counter, (unsigned long long)(end - begin));
    return 0;
}
