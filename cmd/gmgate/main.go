// Command gmgate is the IPsec SIP front end of an IMS core: the daemon, the checks of its configuration and of the
// host, the operator's commands, and a demonstration in network namespaces.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"
)

// Set by the Makefile.
var (
	version  = "devel"
	revision = ""
)

const usage = `gmgate: IPsec SIP front end of an IMS core (Gm, ipsec-3gpp)

usage: gmgate COMMAND [FLAGS]

  run -c FILE      run the daemon
  check -c FILE    check a configuration file: every mistake with its line
  preflight        tell whether this host can run gmgate, and what to do if not
  example          print a commented configuration file
  ue COMMAND       look at the phones of a running daemon, and end registrations
  bpf COMMAND      look at the eBPF programs that outlive a daemon, and take them away
  drops [--follow] what the guard in front of the ESP ports drops, and why
  demo [FLAGS]     register phones and make calls through gmgate in network namespaces
  version          print the version

'gmgate COMMAND -h' lists the flags of a command.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := command(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// command runs one command line and returns the exit status: 0 success, 1 failure, 2 wrong usage.
func command(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		_, _ = io.WriteString(stderr, usage)
		return 2
	}
	rest := args[1:]
	switch args[0] {
	case "run":
		return runMain(ctx, rest, stderr)
	case "check":
		return checkMain(rest, stdout, stderr)
	case "preflight":
		return preflightMain(ctx, rest, stdout, stderr)
	case "example":
		return exampleMain(rest, stdout, stderr)
	case "ue":
		return ueMain(ctx, rest, stdout, stderr)
	case "bpf":
		return bpfMain(rest, stdout, stderr)
	case "drops":
		return dropsMain(ctx, rest, stdout, stderr)
	case "demo":
		return demoMain(ctx, rest, stdout, stderr)
	case "version", "-version", "--version":
		_, _ = fmt.Fprintf(stdout, "gmgate %s %s %s %s/%s\n", version, vcsRevision(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
		return 0
	case "help", "-h", "-help", "--help":
		_, _ = io.WriteString(stdout, usage)
		return 0
	}
	_, _ = fmt.Fprintf(stderr, "gmgate: no command %q\n\n%s", args[0], usage)
	return 2
}

// vcsRevision returns the revision set by the Makefile, else the one that the Go tool recorded.
func vcsRevision() string {
	if revision != "" {
		return revision
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				return s.Value
			}
		}
	}
	return "unknown"
}
