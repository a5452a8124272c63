# shellcheck shell=bash
# The part of install.sh that unpacks the model and tests it; it is sourced there and uses what stands there.
: "${prefix:?}" "${model:?}" "${name:?}" "${extras:?}" "${venv:?}" "${stamp:?}" "${user:?}" "${python:?}" "${command[0]:?}"

folder "$(dirname -- "$model")"
incoming="${model%/*}/.$name.$stamp" as=() build=()
note tree "$incoming"
root mkdir -m 700 -- "$root$incoming"
if [[ -z $root ]]; then # an archive is somebody's, and an engine may hold code: a user who owns nothing else reads it
    groups=--clear-groups group="$(id -g "$user" 2>/dev/null || echo "$user")"
    [[ $extras != jetson ]] || groups=--groups=video,render # as in jetson.conf
    # In a session of its own, or it could type into this terminal.
    as=(setsid -w setpriv "--reuid=$user" "--regid=$group" "$groups" --no-new-privs
        env -i "HOME=$incoming" PATH=/usr/bin:/bin LC_ALL=C.UTF-8)
    # The GPU's devices, which only root can make.
    [[ ! -x /usr/bin/nvidia-modprobe ]] || root /usr/bin/nvidia-modprobe -u -c=0 || true
    root "${as[@]}" "$venv/bin/python" -I -c '' ||
        die "$user cannot run $python: want a Python that everybody may run; name one with --python"
    if ! root "${as[@]}" test -r "$archive"; then
        root install -m 444 -- "$archive" "$incoming/archive.lvd"
        archive="$incoming/archive.lvd"
    fi
    root chown "$user" -- "$incoming"
fi
root ${as[@]+"${as[@]}"} "${command[@]}" unpack "$archive" -o "$root$incoming/model"
[[ ,$extras, != *,build,* && $extras != jetson ]] || build=(--build)
if [[ ,$extras, == *,gpu,* && ,$extras, == *,build,* ]]; then
    root ${as[@]+"${as[@]}"} "${command[@]}" build "$root$incoming/model" --backend onnxruntime-cuda ||
        say "   No engine for the GPU could be built: it answers on the CPU"
fi
root ${as[@]+"${as[@]}"} "${command[@]}" selftest "$root$incoming/model" ${build[@]+"${build[@]}"}
if [[ -z $root ]]; then # the folder first: then nobody else can change what is in it meanwhile
    root chown root: -- "$incoming"
    root chown -hR root: -- "$incoming"
    root chmod -R go-w -- "$incoming"
fi
