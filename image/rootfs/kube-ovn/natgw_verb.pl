# One verb, asked of a daemon that listens: perl natgw_verb.pl PYTHON WORD ...
#
# A controller waits for one process per rule, and Perl is up in 1 ms where Python takes 8. So this is natgw_verb.py for
# the case that counts; whatever else there is (no daemon yet, one that cannot be reached or is not ours) goes on there,
# before anything has been sent. Nothing is imported: the module Socket alone would double the time.
use strict;

my $deadline = 60;  # seconds
# AF_UNIX, SOCK_STREAM, SOL_SOCKET, SO_PEERCRED, SHUT_WR: Linux' numbers. Where they are others (POWER), Python goes on.
my ($unix, $stream, $socket_level, $peer_credentials, $write_side) = (1, 1, 1, 17, 1);
my @per_call = qw(GATEWAY_V4 GATEWAY_V6 VPC_INTERFACE EXTERNAL_INTERFACE);

my ($python, @words) = @ARGV;
my $run_dir = value('NATGW_RUN_DIR') // '/run/natgw';
my ($here) = __FILE__ =~ m{^(.*)/};

$SIG{PIPE} = 'IGNORE';
$SIG{ALRM} = sub { answer(1, '', failure("no answer within $deadline s")) };
alarm $deadline;
my $daemon = reach() or hand_over();
my @answer = split /\0/, exchange(request()), -1;
answer(@answer[0 .. 2]) if @answer == 4 && $answer[0] =~ /^\d+$/;
answer(1, '', failure('the daemon ended before it answered'));

sub value {
    my $value = $ENV{$_[0]};
    return defined $value && length $value ? $value : undef;
}

# A socket connected to a daemon that is root's or our own: where others may write to the directory, it could be anybody's.
sub reach {
    socket my $socket, $unix, $stream, 0 or return;
    connect $socket, pack 'Sa*', $unix, "$run_dir/exec.sock" or return;
    my ($pid, $uid, $gid) = unpack 'lLL', getsockopt($socket, $socket_level, $peer_credentials) // '';
    return defined $gid && ($uid == 0 || $uid == $>) ? $socket : undef;
}

sub hand_over {
    $SIG{PIPE} = $SIG{ALRM} = 'DEFAULT';
    delete $ENV{PERL_BADLANG};  # nat-gateway.sh's; the daemon is not to have it
    exec { $python } $python, '-I', '-S', '-B', "$here/natgw_verb.py", @words;
    answer(1, '', failure("$python: $!"));
}

# The words and the environment of this call as the daemon reads them (api/execwire.py).
sub request {
    my $namespace = (stat '/proc/self/ns/net')[1];
    my @values = map { defined value($_) ? "$_=" . value($_) : () } @per_call;
    return join "\0", 'natgw-exec/1', $namespace, @values, '', @words, '';
}

sub exchange {
    my ($request) = @_;
    my $answer = '';
    put($daemon, $request) && shutdown $daemon, $write_side or return $answer;
    1 while sysread $daemon, $answer, 65536, length $answer;
    return $answer;
}

# All of the text, or as much as somebody reads; whether it was all.
sub put {
    my ($where, $text) = @_;
    while (length $text) {
        my $written = syswrite $where, $text or return 0;
        substr $text, 0, $written, '';
    }
    return 1;
}

sub failure { return "nat gateway: $run_dir: $_[0]\n" }

sub answer {
    my ($code, $out, $err) = @_;
    put(\*STDOUT, $out);
    put(\*STDERR, $err);
    exit $code;
}
