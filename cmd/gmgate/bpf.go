package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"strings"

	"github.com/gmgate/gmgate/control/config"
	"github.com/gmgate/gmgate/dataplane/guard"
)

const bpfUsage = `usage: gmgate bpf COMMAND [-c FILE | -pin DIRECTORY]

  show      what an instance has loaded and pinned
  unload    take its programs off the interfaces and remove its maps, once gmgate has ended

'gmgate drops' shows the counters of a running daemon.
`

// bpfMain looks at what outlives a daemon of its eBPF programs, and takes it away. Exit status: 0 done, 1 failed, 2 wrong
// usage.
func bpfMain(args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		_, _ = io.WriteString(stderr, bpfUsage)
		return 2
	}
	command := args[0]
	switch command {
	case "help", "-h", "-help", "--help":
		_, _ = io.WriteString(stdout, bpfUsage)
		return 0
	case "show", "unload":
	default:
		_, _ = fmt.Fprintf(stderr, "gmgate bpf: no command %q\n\n%s", command, bpfUsage)
		return 2
	}
	pin, code := bpfPin(command, args[1:], stderr)
	if code >= 0 {
		return code
	}
	var err error
	if command == "show" {
		err = bpfShow(pin, stdout)
	} else {
		err = bpfUnload(pin, stdout)
	}
	if err != nil {
		_, _ = fmt.Fprintf(stderr, "gmgate bpf %s: %v\n", command, err)
		if errors.Is(err, guard.ErrLocked) {
			_, _ = io.WriteString(stderr, "hint: stop gmgate first; while it runs its guard stays\n")
		}
		return 1
	}
	return 0
}

// bpfPin finds the pin directory. A code of 0 or more is the exit status to end with.
func bpfPin(command string, args []string, stderr io.Writer) (pin string, code int) {
	flags := flag.NewFlagSet("gmgate bpf "+command, flag.ContinueOnError)
	flags.SetOutput(stderr)
	file := flags.String("c", "", "configuration `file` of the daemon (default "+defaultConfig+")")
	flags.StringVar(&pin, "pin", "", "pin `directory`, instead of the one of the configuration")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return "", 0
	case err != nil:
		return "", 2
	}
	if flags.NArg() > 0 {
		_, _ = fmt.Fprintf(stderr, "gmgate bpf %s: unexpected argument %q\n", command, flags.Arg(0))
		return "", 2
	}
	if pin != "" {
		return pin, -1
	}
	name := *file
	if name == "" {
		name = defaultConfig
	}
	cfg, err := config.Load(name)
	if err != nil {
		report(stderr, err)
		if *file == "" && errors.Is(err, fs.ErrNotExist) {
			_, _ = io.WriteString(stderr, "hint: name the configuration with -c, or the directory with -pin\n")
		}
		return "", 1
	}
	if cfg.PinPath() == "" {
		_, _ = fmt.Fprintf(stderr, "gmgate bpf %s: guard.pin is empty in %s: nothing outlives the daemon\n", command, name)
		return "", 1
	}
	return cfg.PinPath(), -1
}

func bpfShow(pin string, stdout io.Writer) error {
	names := guard.Pinned(pin)
	if len(names) == 0 {
		_, err := fmt.Fprintf(stdout, "nothing in %s\n", pin)
		return err
	}
	rows := [][]string{{"INTERFACE", "HOOK"}}
	for _, h := range guard.Attached(pin) {
		rows = append(rows, []string{h.Interface, string(h.Kind)})
	}
	_, err := fmt.Fprintf(stdout, "%s\n%spinned: %s\n", pin, columns(rows, -1), strings.Join(names, ", "))
	return err
}

func bpfUnload(pin string, stdout io.Writer) error {
	found, err := guard.Unload(pin, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	if !found {
		_, err = fmt.Fprintf(stdout, "nothing in %s\n", pin)
	} else {
		_, err = fmt.Fprintf(stdout, "unloaded %s: programs are off the interfaces, maps are gone\n", pin)
	}
	return err
}
