#!/usr/bin/env bash
# Installs llava-deploy on a machine that answers: no PyTorch, nothing but what answering takes. See README.md.
# shellcheck source-path=SCRIPTDIR
set -euo pipefail
umask 022
unset PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE # of whoever calls this; no business of the environment that is made

usage() {
    cat <<'EOF'
Usage: install.sh [OPTIONS]

Installs llava-deploy, and with --archive a model and its service. Says every step before it does it. Run it again to
upgrade: what was there works until the new one has proved itself.

  --archive FILE   a model, as `llava-deploy pack` makes it: unpacked, put to its self-test, served
  --name NAME      of the model; by default the archive's, without .lvd
  --wheel FILE     the package to install, instead of the checkout that this script lies in
  --source DIR     another checkout to install from
  --extras LIST    cpu or gpu, rtx, build, tensorrt, with commas between, or jetson; by default what suits the machine.
                   gpu is ONNX Runtime on an NVIDIA GPU, with CUDA's and cuDNN's libraries; it runs on the CPU, too
  --offline DIR    take every package from this folder of wheels, none from an index
  --python FILE    the Python to use; by default the newest of 3.13, 3.12 and 3.11, on a Jetson the system's
  --prefix DIR     where the program goes; /opt/llava-deploy by default
  --no-service     no user, no unit: the program alone, and with --archive the model
  --root DIR       put everything below DIR and change nothing else: for a trial, or an image that is being made
  --no-trim        keep packages and files that answering never uses
  --dry-run        print the commands, do nothing
  --help           show this
EOF
}

say() { printf '%s\n' "$*"; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}
run() {
    printf '  $'
    printf ' %q' "$@"
    printf '\n'
    [[ $dry == yes ]] || "$@"
}
root() { run ${sudo[@]+"${sudo[@]}"} "$@"; } # by root, where this is not a throw-away root

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
archive='' name='' wheel='' source='' extras='' offline='' python='' prefix=/opt/llava-deploy root=''
service=yes trim=yes dry=no
while (($#)); do
    case $1 in
        --archive | --name | --wheel | --source | --extras | --offline | --python | --prefix | --root)
            (($# > 1)) || die "$1: want a value behind it; see --help"
            printf -v "${1#--}" '%s' "$2"
            [[ -n $2 ]] || die "$1: want a value, got an empty one"
            shift
            ;;
        --no-service) service=no ;;
        --no-trim) trim=no ;;
        --dry-run) dry=yes ;;
        --help | -h) usage && exit ;;
        *) die "$1: not known; see --help" ;;
    esac
    shift
done

[[ $prefix =~ ^(/[A-Za-z0-9._-]+)+$ && ! $prefix =~ /\.\.?(/|$) ]] ||
    die "--prefix $prefix: want an absolute path of letters, digits and . _ -, such as /opt/llava-deploy"
[[ -z $root || -d $root ]] || die "--root $root: no such directory; make it first"
[[ -z $root ]] || root="$(cd -- "$root" && pwd -P)"
[[ $root != / ]] || root=''
[[ -z $archive || -f $archive ]] || die "--archive $archive: no such file; make one with: llava-deploy pack BUNDLE -o model.lvd"
[[ -z $offline || -d $offline ]] || die "--offline $offline: no such directory; fill it with: pip download"
[[ -z $wheel || -f $wheel ]] || die "--wheel $wheel: no such file; make one with: pip wheel --no-deps"
[[ -z $wheel || -z $source ]] || die "--wheel and --source: want one of them"
[[ -n $wheel || -n $source ]] || source="$(dirname -- "$here")"
[[ -n $wheel || -f $source/pyproject.toml ]] || die "$source: no checkout of llava-deploy; name a package with --wheel, or a checkout with --source"
[[ -n $name ]] || { name="$(basename -- "${archive:-model}")" && name="${name%.lvd}"; }
[[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || die "the model's name, $name: want letters, digits and . _ -; choose one with --name"
for tool in "$here"/{uninstall,machine,model,service}.sh "$here/trim.py" "$here/llava-deploy@.service"; do
    [[ -f $tool ]] || die "$tool: not there; keep the folder deploy/ together"
done

sudo=()
if ((EUID != 0)) && [[ -z $root ]]; then
    command -v sudo >/dev/null || die "$prefix is root's: run this as root, or install sudo"
    sudo=(sudo)
fi

say "1. The machine"
machine="$(uname -m)"
[[ $(uname -s) == Linux && ($machine == x86_64 || $machine == aarch64) ]] ||
    die "want Linux on x86-64 or arm64, found $(uname -s) on $machine: there are no packages of its backends for it"
# shellcheck source=machine.sh
source "$here/machine.sh"
driver="$(cuda_driver)" gpu="$(capability)"
if [[ -z $extras ]]; then
    extras="$(extras_for "$machine" "$driver" "$gpu")"
    if [[ -f /etc/nv_tegra_release ]] || grep -qs nvidia,tegra /proc/device-tree/compatible; then extras=jetson; fi
fi
[[ $extras =~ ^(jetson|(cpu|gpu|rtx|build|tensorrt)(,(cpu|gpu|rtx|build|tensorrt))*)$ ]] ||
    die "--extras $extras: want some of cpu, gpu, rtx, build and tensorrt with commas between, or jetson"
[[ ,$extras, != *,cpu,* || ,$extras, != *,gpu,* ]] || die "--extras $extras: want cpu or gpu; gpu runs on the CPU, too"
oldest=11
[[ ,$extras, == *,cpu,* || ,$extras, == *,gpu,* ]] || oldest=10 # ONNX Runtime has no release for 3.10 that reads our graphs
# Everywhere -I: what lies in the caller's directory is not imported, least of all by root.
fits() {
    "$1" -I -c "import sys, venv, ensurepip; sys.exit(not (3, $oldest) <= sys.version_info[:2] <= (3, 13))" 2>/dev/null
}
if [[ -z $python ]]; then
    candidates=(python3.13 python3.12 python3.11 python3)
    [[ $extras != jetson ]] || candidates=(/usr/bin/python3) # the one that JetPack's TensorRT is for
    for candidate in "${candidates[@]}"; do
        if fits "$candidate"; then python="$(command -v "$candidate")" && break; fi
    done
fi
fits "$python" || die "want Python 3.$oldest to 3.13 with venv, found ${python:-none}; on Ubuntu 24.04: sudo apt-get install" \
    "python3-venv, on 22.04: sudo apt-get install python3.11 python3.11-venv, or name one with --python"
[[ $extras != jetson ]] || "$python" -I -c 'import tensorrt' 2>/dev/null ||
    die "$python has no TensorRT, which JetPack brings: sudo apt-get install nvidia-jetpack, or python3-libnvinfer alone"
wanted=1000
[[ ,$extras, != *,gpu,* && ,$extras, != *,rtx,* && ,$extras, != *,tensorrt,* ]] || wanted=6000
[[ -z $archive ]] || wanted=$((wanted + 3 * $(stat -Lc %s -- "$archive") / 1000000))
place="$root$prefix"
while [[ ! -d $place ]]; do place="$(dirname -- "$place")"; done
free=$(($(df -Pk -- "$place" | awk 'NR == 2 { print $4 }') / 1000))
((free >= wanted)) || die "$place: want $wanted MB of disk, found $free; free some, or name another --prefix"
if [[ -d $root$prefix && ! -f $root$prefix/installed && -n $(ls -A -- "$root$prefix") ]]; then
    die "$root$prefix: something else is there, and stays; name another --prefix"
fi
memory=$(($(awk '/^MemTotal:/ { print $2 }' /proc/meminfo) / 1000))
say "   $machine, $memory MB of memory, $free MB of disk, $("$python" -V) at $python, extras: $extras"

# From here on, what is made is written down before it is made: uninstall.sh removes that and nothing else.
list="$root$prefix/installed" notes=()
declare -A made=() # folders, for a dry run says them once too
note() { # KIND PATH; kept in mind until there is a place for the list
    [[ $dry == no ]] || return 0
    grep -qsxF -- "$1 $2" "$list" || notes+=("$1 $2")
    if [[ -d $root$prefix ]] && ((${#notes[@]})); then
        printf '%s\n' "${notes[@]}" | ${sudo[@]+"${sudo[@]}"} tee -a -- "$list" >/dev/null
        notes=()
    fi
}
folder() { # and its parents
    if [[ ! -d $root$1 && -z ${made[$1]-} ]]; then
        folder "$(dirname -- "$1")"
        made[$1]=yes
        note dir "$1"
        root mkdir -- "$root$1"
    fi
}
write() { # PATH MODE [KIND], from standard input
    folder "$(dirname -- "$1")"
    note "${3:-file}" "$1"
    root install -m "$2" /dev/stdin "$root$1"
    [[ $dry == no ]] || cat >/dev/null # or whoever writes into the pipe dies of it
}

work=/tmp/llava-deploy.XXXXXX stamp="$(date -u +%Y%m%dT%H%M%S).$$" done=no
venv="$prefix/venvs/$stamp" model="/var/lib/llava-deploy/models/$name" incoming='' before='' old=''
[[ $dry == yes ]] || work="$(mktemp -d "${TMPDIR:-/tmp}/llava-deploy.XXXXXX")"
switch() { # a link is replaced in one step
    root ln -sfn -- "$1" "$root$prefix/current.new"
    root mv -fT -- "$root$prefix/current.new" "$root$prefix/current"
}
back() { # to the program and the model of before, if they had to make room already
    if [[ -n $before && $(readlink -- "$root$prefix/current") != "$before" ]]; then switch "$before"; fi
    if [[ -n $old && -e $root$old ]]; then
        root rm -rf -- "$root$model"
        root mv -T -- "$root$old" "$root$model"
    fi
}
clean() {
    local status=$?
    if [[ $dry == no ]]; then
        rm -rf -- "$work"
        if [[ $done == no ]]; then
            back >&2
            ${sudo[@]+"${sudo[@]}"} rm -rf -- "$root$venv" ${incoming:+"$root$incoming"}
            if [[ -e $root$prefix/current ]]; then
                say "Not installed. What was there before is as it was, and works on." >&2
            elif [[ -e $list ]]; then
                ${sudo[@]+"${sudo[@]}"} "$here/uninstall.sh" --prefix "$prefix" ${root:+--root "$root"} >/dev/null
                say "Not installed; nothing is left of it." >&2
            fi
        fi
    fi
    exit "$status"
}
trap clean EXIT
trap 'exit 130' INT TERM

if [[ -z $wheel ]]; then
    say "2. Make a wheel of $source, as the user who calls this"
    packages=(--no-index --find-links "$offline")
    [[ -n $offline ]] || packages=()
    run mkdir -- "$work/source"
    copy() { tar -C "$source" --exclude=./.git --exclude='./.venv*' --exclude=./build --exclude='*.egg-info' -cf - . | tar -C "$work/source" -xf -; }
    run copy
    run "$python" -I -m venv -- "$work/tool"
    run "$work/tool/bin/python" -I -m pip wheel -q --no-deps ${packages[@]+"${packages[@]}"} -w "$work/wheel" -- "$work/source"
    wheel="$work/wheel/llava_deploy.whl"
    [[ $dry == yes ]] || wheel="$(echo "$work"/wheel/*.whl)"
else
    say "2. The package is $wheel"
fi

say "3. A new environment in $root$venv, without PyTorch"
folder "$prefix/venvs"
note tree "$venv"
options=() packages=("${wheel}[$extras]")
[[ ,$extras, != *,gpu,* ]] || packages+=("$(onnxruntime_gpu "$machine" "$driver" "$gpu")")
if [[ $extras == jetson ]]; then
    options=(--system-site-packages)
    packages=("${wheel}[build]" 'cuda-python>=12.6')
fi
flags=(--disable-pip-version-check --no-cache-dir --no-compile --progress-bar off -q)
for constraints in "$here/constraints.txt" "$here/../constraints.txt"; do
    if [[ -f $constraints ]]; then flags+=(-c "$constraints") && break; fi
done
[[ -z $offline ]] || flags+=(--no-index --find-links "$offline")
root "$python" -I -m venv ${options[@]+"${options[@]}"} -- "$root$venv"
root "$root$venv/bin/python" -I -m pip install "${flags[@]}" -- "${packages[@]}"
[[ $trim == no ]] || root "$root$venv/bin/python" -I "$here/trim.py"
# What an import compiles stays with it: the service may not write there.
root "$root$venv/bin/python" -I -c 'import llava_deploy.cli, llava_deploy.runtime.selftest, llava_deploy.runtime.serve.service'
command=("$root$venv/bin/python" -I -c 'from llava_deploy.cli import main; main(prog_name="llava-deploy")')
root "${command[@]}" --version

systemd=no user=nobody sysusers=/etc/sysusers.d/llava-deploy.conf
if [[ $service == yes ]]; then
    [[ -n $root || ! -d /run/systemd/system ]] || systemd=yes
    [[ -f $root$sysusers ]] || printf 'u llava-deploy - "answers questions about pictures"\n' | write "$sysusers" 644
fi
if [[ $systemd == yes ]]; then
    user=llava-deploy
    getent passwd "$user" >/dev/null || note user "$user"
    root systemd-sysusers "$sysusers"
fi
if [[ -n $archive ]]; then
    say "4. The model $name, and its self-test"
    # shellcheck source=model.sh
    source "$here/model.sh"
fi

say "5. Put it in its place"
wrapper() { # the environment's own path, not that of the link: a service that runs keeps its environment
    cat <<'EOF'
#!/bin/sh
home="$(dirname -- "$(dirname -- "$(readlink -f -- "$0")")")"
exec "$(readlink -f -- "$home/current")/bin/python" -I -c 'from llava_deploy.cli import main; main(prog_name="llava-deploy")' "$@"
EOF
}
wrapper | write "$prefix/bin/llava-deploy" 755
write "$prefix/uninstall.sh" 755 <"$here/uninstall.sh"
before="$(readlink -- "$root$prefix/current" || true)"
note link "$prefix/current"
switch "venvs/$stamp"
if [[ -n $archive ]]; then
    note model "$model"
    if [[ -e $root$model ]]; then
        note tree "${model%/*}/.$name.old"
        root rm -rf -- "$root${model%/*}/.$name.old"
        old="${model%/*}/.$name.old"
        root mv -T -- "$root$model" "$root$old"
    fi
    root mv -T -- "$root$incoming/model" "$root$model"
    root rm -rf -- "$root$incoming"
fi
link=/usr/local/bin/llava-deploy
if [[ ! -e $root$link && ! -L $root$link ]]; then
    folder "${link%/*}"
    note link "$link"
    root ln -sr -- "$root$prefix/bin/llava-deploy" "$root$link"
elif [[ ! $root$link -ef $root$prefix/bin/llava-deploy ]]; then
    say "   $root$link is something else, and stays: call $root$prefix/bin/llava-deploy"
fi
done=yes

if [[ $service == yes ]]; then
    say "6. The service"
    # shellcheck source=service.sh
    source "$here/service.sh"
fi
used() { # by a process: a service that was not started again, say
    [[ $dry == no ]] && ${sudo[@]+"${sudo[@]}"} grep -qsFf - /proc/[0-9]*/{cmdline,maps} <<<"$1/"
}
# Of before, and of runs that were killed.
for path in "$root$prefix"/venvs/* "$root${model%/*}/.$name."*; do
    [[ -d $path && $path != "$root$venv" ]] || continue
    if used "$path"; then say "   $path is in use, and stays until the next run"; else root rm -rf -- "$path"; fi
done
say "Done: llava-deploy is at $root$prefix/bin/llava-deploy. Away with it again: $root$prefix/uninstall.sh"
