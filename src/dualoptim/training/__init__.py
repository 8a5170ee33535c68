"""What `trainer` needs beside its steps: arguments, callbacks, evaluation, engines, gradients of several objectives."""
