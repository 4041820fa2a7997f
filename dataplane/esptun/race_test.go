//go:build race

package esptun

const raceEnabled = true
