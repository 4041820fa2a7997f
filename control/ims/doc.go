// Package ims is the vocabulary of gmgate: the words of TS 33.203 and TS 24.229 as Go types.
//
// It is a leaf: it imports the standard library only and everybody may import it. Values are plain data and safe to
// copy; nothing here blocks or locks. Clause numbers throughout the project refer to TS 33.203 Release 17, TS 24.229
// Release 17 and RFC 3329.
package ims
