package probe

// Hook says where on an interface the guard's program would be attached.
type Hook struct {
	Interface string
	Hook      string // xdp, xdp-generic, tcx, tc or none
	Reason    string // why this one
	Err       error  // why none of the better ones; nil if there was nothing to try
}
