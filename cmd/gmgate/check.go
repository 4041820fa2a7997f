package main

import (
	"errors"
	"flag"
	"fmt"
	"io"

	"github.com/gmgate/gmgate/control/config"
)

// checkMain reports every mistake of a configuration file with its line.
func checkMain(args []string, stdout, stderr io.Writer) int {
	file, code := fileFlag("check", args, stderr)
	if code >= 0 {
		return code
	}
	cfg, err := config.Load(file)
	if err != nil {
		report(stderr, err)
		return 1
	}
	_, _ = fmt.Fprintf(stdout, "%s: ok: %d Gm and %d Mw addresses, %d workers, algorithms %v, ipsec %s, %d rules\n",
		file, len(cfg.Gm.Addresses), len(cfg.Mw.Addresses), cfg.WorkerCount(), cfg.Security.Suites(), cfg.Security.IPsec,
		len(cfg.Security.Rules))
	return 0
}

// report prints what is wrong with a configuration, one problem per line.
func report(w io.Writer, err error) {
	_, _ = fmt.Fprintln(w, err)
	if problems, ok := errors.AsType[config.Errors](err); ok && len(problems) > 1 {
		_, _ = fmt.Fprintf(w, "%d problems\n", len(problems))
	}
}

// exampleMain prints a commented configuration file.
func exampleMain(args []string, stdout, stderr io.Writer) int {
	fs := flag.NewFlagSet("gmgate example", flag.ContinueOnError)
	fs.SetOutput(stderr)
	switch err := fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	case fs.NArg() > 0:
		_, _ = fmt.Fprintf(stderr, "gmgate example: unexpected argument %q: it prints to standard output\n", fs.Arg(0))
		return 2
	}
	if err := config.WriteExample(stdout); err != nil {
		_, _ = fmt.Fprintln(stderr, err)
		return 1
	}
	return 0
}

// fileFlag reads the flag -c of a command. A code of 0 or more is the exit status to end with.
func fileFlag(command string, args []string, stderr io.Writer) (file string, code int) {
	fs := flag.NewFlagSet("gmgate "+command, flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&file, "c", "/etc/gmgate/gmgate.yaml", "configuration `file`")
	switch err := fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return "", 0
	case err != nil:
		return "", 2
	case fs.NArg() > 0:
		_, _ = fmt.Fprintf(stderr, "gmgate %s: unexpected argument %q\n", command, fs.Arg(0))
		return "", 2
	}
	return file, -1
}
